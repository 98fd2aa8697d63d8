# Makes a service unit for who wants no socket unit: the daemon binds what its configuration says.
# It needs a network for that, and can neither be started by a connection nor keep those that
# arrive while it restarts.
1i\
# /etc/systemd/system/tcpupperd.service: the daemon binds what "listen" says in its configuration.\
# First: systemctl disable --now tcpupperd.socket tcpupperd.service\
# then: systemctl daemon-reload && systemctl enable --now tcpupperd.service
/^# The socket unit is the only place/d
/^Requires=tcpupperd\.socket/d
s/^After=.*/After=network.target/
/^# A service that gave up would take its socket/d
/^# Sockets that are passed in stay usable/d
/^PrivateNetwork=/d
/^IPAddressDeny=/d
# What /etc/resolv.conf leads to.
s,^BindReadOnlyPaths=/run/.*,& -/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf,
s/^# For the notifications to systemd\./# To listen, and for the notifications to systemd./
s/^RestrictAddressFamilies=.*/& AF_INET AF_INET6/
/^Also=/d
