"""Twisted: its own protocol for lines."""

import sys

from twisted.internet import reactor
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import ServerFactory
from twisted.protocols.basic import LineReceiver
from zope.interface import implementer


# Without this interface Twisted drops answers that are unsent when the client half-closes.
@implementer(IHalfCloseableProtocol)
class UpperProtocol(LineReceiver):
    delimiter = b"\n"
    MAX_LENGTH = 128 * 1024

    def connectionMade(self) -> None:  # noqa: N802 - Twisted's name, like those below
        self.transport.setTcpNoDelay(True)

    def lineReceived(self, line: bytes) -> None:  # noqa: N802
        self.sendLine(line.upper())

    def readConnectionLost(self) -> None:  # noqa: N802
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:  # noqa: N802
        pass


factory = ServerFactory.forProtocol(UpperProtocol)
factory.noisy = False
reactor.listenTCP(int(sys.argv[1]), factory, interface="127.0.0.1", backlog=4096)
reactor.run()
