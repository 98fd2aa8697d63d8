"""Keep the connections of a service open while it restarts.

A restart or an upgrade ends the connections of a service, unless something keeps their sockets in
the meantime. systemd can: in the file descriptor store of the unit. `Service` is all that a daemon
needs for this:

    service = Service("counter", listen=("127.0.0.1", 7000))
    service.ready()
    selector.register(service, EVENT_READ)      # signals, watchdog and clients, all in one
    ...
        for event in service.events():          # whenever `service` is readable
            match event:
                case Client(sock, state): ...   # serve it; `state` is what was left with it
                case Order.RELOAD: ...          # read the settings again, then service.ready()
                case Order.KEEP:                # systemctl restart, apt upgrade
                    service.leave((sock, state) for ...)
                    sys.exit()
                case Order.END:                 # systemctl stop
                    service.end((sock, unsent, answer) for ...)
                    sys.exit()

A connection is handed over as its socket and some bytes, whose meaning is the program's: an unsent
answer, an incomplete line, a counter. For asyncio, there is `outlive.aio`, which also keeps the
content of its streams.

Besides a socket unit, the service unit needs:

    Type=notify
    Restart=always
    # Distinguishes a restart from a stop, and may arrive before the program has begun.
    RestartKillSignal=SIGUSR2
    SuccessExitStatus=SIGUSR2
    # Without this, Order.KEEP never comes, and a restart is a stop.
    FileDescriptorStoreMax=8
"""

TYPE_CHECKING = False  # as in typing, which not every program loads
if TYPE_CHECKING:
    from outlive.items import Client, Item
    from outlive.service import Order, Service

__all__ = ["Client", "Item", "Order", "Service"]


def __getattr__(name: str) -> object:
    """Import a name on first use (PEP 562): a program that uses only a part, such as
    `outlive.channel`, does not load the rest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from outlive import service

    return getattr(service, name)
