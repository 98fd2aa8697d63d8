# Generates the units for additional instances, tcpupperd@.service, tcpupperd@.socket and the
# other sockets, from those of the default instance. An instance is named after its port, and so
# is its configuration file.
s/^Description=.*/&, port %i/
/^Environment=\|^ExecStop=/!s/tcpupperd\(-metrics\|-proxy\|-lab\)\?\.\(service\|socket\)/tcpupperd\1@%i.\2/g
s,/tcpupperd\.toml,/%i.toml,
# The other sockets have the port of the instance, on other addresses of this host.
/^ListenStream=\[::1\]:999[278]$/d
s/^ListenStream=127\.0\.0\.1:99\(9[278]\)$/ListenStream=127.0.0.\1:%i/
s/9999/%i/
# The socket unit checks this, because a service that fails repeatedly would make its socket fail.
/^Description=.*sockets/a\
# If there is no such file, create it (it may be empty) and start this unit again.\
AssertPathExists=/etc/tcpupperd/%i.toml
