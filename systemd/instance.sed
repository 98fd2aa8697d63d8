# Makes the units of a further instance, tcpupperd@.service and tcpupperd@.socket, from those of
# the first. An instance is called by its port, and has a configuration file of that name.
s/^Description=.*/&, port %i/
s/tcpupperd\.socket/tcpupperd@%i.socket/
s,/tcpupperd\.toml,/%i.toml,
s/9999/%i/
# Asked by the socket: a service that fails again and again would make its socket fail.
/^Description=.*sockets/a\
# Where there is no such file, create it (it may be empty) and start this again.\
AssertPathExists=/etc/tcpupperd/%i.toml
