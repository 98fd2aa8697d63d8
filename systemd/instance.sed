# Makes the units of further instances, tcpupperd@.service and tcpupperd@.socket, from those of
# the first. An instance is named after its port, and so is its configuration file.
s/^Description=.*/&, port %i/
s/tcpupperd\.socket/tcpupperd@%i.socket/
s,/tcpupperd\.toml,/%i.toml,
s/9999/%i/
# The socket checks this: a service that fails repeatedly would make its socket fail.
/^Description=.*sockets/a\
# If there is no such file, create it (it may be empty) and start this unit again.\
AssertPathExists=/etc/tcpupperd/%i.toml
