# Makes the units of a further instance, tcpupperd@.service and tcpupperd@.socket, from those of
# the first. An instance is called by its port, and has a configuration file of that name.
s/^Description=.*/&, port %i/
s/tcpupperd\.socket/tcpupperd@%i.socket/
s,/tcpupperd\.toml,/%i.toml,
s/9999/%i/
