# Generates a service unit that needs no socket unit: the daemon binds the addresses in its
# configuration, for which it needs network access. Connections cannot start it, and those that
# arrive during a restart are lost.
1i\
# /etc/systemd/system/tcpupperd.service: the daemon binds the addresses in its "listen" setting.\
# First: systemctl disable --now tcpupperd.socket tcpupperd.service\
# then: systemctl daemon-reload && systemctl enable --now tcpupperd.service
/^# Addresses can be set only in the socket unit/d
/^# PartOf= restarts and stops/,/^# fails because another program/d
/^Wants=tcpupperd\.socket/d
/^PartOf=tcpupperd\.socket/d
s/^After=.*/After=network.target/
/^# A failed service would also make its socket fail/d
/^# Eight, and one for each listener/,/^# unit was changed, until/d
/^# Where the addresses are set/d
/^Environment=TCPUPPERD_SOCKET_UNIT/d
/^# Removes the spare listeners/,/^ExecStop=/d
/^# Notifications are accepted from/d
/^NotifyAccess=/d
/^# Passed sockets remain usable/d
/^PrivateNetwork=/d
/^IPAddressDeny=/d
# The files that /etc/resolv.conf may point to.
s,^BindReadOnlyPaths=/run/.*,& -/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf,
s/^# For the notifications to systemd\./# To listen, and for the notifications to systemd./
s/^RestrictAddressFamilies=.*/& AF_INET AF_INET6/
# To listen, and to resolve names.
/^SystemCallErrorNumber=/i\
SystemCallFilter=bind connect listen sendmmsg
/^Also=/d
