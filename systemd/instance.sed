# Generates the units for additional instances, tcpupperd@.service and tcpupperd@.socket, from
# those of the default instance. An instance is named after its port, and so is its configuration
# file.
s/^Description=.*/&, port %i/
s/tcpupperd\.socket/tcpupperd@%i.socket/
s,/tcpupperd\.toml,/%i.toml,
s/9999/%i/
# The socket unit checks this, because a service that fails repeatedly would make its socket fail.
/^Description=.*sockets/a\
# If there is no such file, create it (it may be empty) and start this unit again.\
AssertPathExists=/etc/tcpupperd/%i.toml
