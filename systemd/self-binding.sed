# Makes a service unit that needs no socket unit: the daemon binds the addresses of its
# configuration. It needs network access for that. A connection cannot start it, and those that
# arrive during a restart are lost.
1i\
# /etc/systemd/system/tcpupperd.service: the daemon binds the addresses of its "listen" setting.\
# First: systemctl disable --now tcpupperd.socket tcpupperd.service\
# then: systemctl daemon-reload && systemctl enable --now tcpupperd.service
/^# The socket unit is the only place/d
/^Requires=tcpupperd\.socket/d
s/^After=.*/After=network.target/
/^# A failed service would take its socket/d
/^# Sockets that are passed in stay usable/d
/^PrivateNetwork=/d
/^IPAddressDeny=/d
# The files that /etc/resolv.conf may point to.
s,^BindReadOnlyPaths=/run/.*,& -/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf,
s/^# For the notifications to systemd\./# To listen, and for the notifications to systemd./
s/^RestrictAddressFamilies=.*/& AF_INET AF_INET6/
/^Also=/d
