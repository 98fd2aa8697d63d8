/* The limit: one thread, one epoll, no language between the program and the kernel.
 *
 * Like every peer it answers complete lines upper-cased, ASCII letters only, and keeps the
 * beginning of a line until its newline has come. A client that does not read is not read from.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER_SIZE = 256 * 1024, EVENTS_PER_TURN = 64 };

struct connection {
    int fd;
    size_t unsent; /* bytes of `kept` that are answers the kernel did not take yet */
    size_t length; /* bytes of `kept`: unsent answers, then the beginning of a line */
    char *kept;    /* allocated only while there is something to keep */
};

static char buffer[BUFFER_SIZE];

/* Without a branch, so that the compiler makes one vector loop of it. */
static void upper(char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        text[i] ^= (unsigned char)((unsigned char)(text[i] - 'a') < 26) << 5;
}

static void watch(int epoll, int operation, struct connection *connection, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(epoll, operation, connection->fd, &event) < 0)
        err(1, "epoll_ctl");
}

static void accept_all(int epoll, int listener)
{
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *connection = calloc(1, sizeof *connection);
        if (!connection)
            err(1, "calloc");
        connection->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(epoll, EPOLL_CTL_ADD, connection, EPOLLIN);
    }
    if (errno != EAGAIN)
        warn("accept4");
}

static void drop(struct connection *connection)
{
    close(connection->fd); /* takes it out of the epoll too */
    free(connection->kept);
    free(connection);
}

static void keep(struct connection *connection, const char *text, size_t length, size_t unsent)
{
    char *kept = NULL;
    if (length) {
        if (!(kept = malloc(length)))
            err(1, "malloc");
        memcpy(kept, text, length);
    }
    free(connection->kept);
    connection->kept = kept;
    connection->length = length;
    connection->unsent = unsent;
}

/* Send the first `answers` bytes of `text` and keep what remains of its `length`.
 * False: the connection is broken. */
static int answer(int epoll, struct connection *connection, const char *text, size_t length,
                  size_t answers)
{
    int was_blocked = connection->unsent > 0;
    ssize_t sent = answers ? send(connection->fd, text, answers, MSG_NOSIGNAL) : 0;
    if (sent < 0 && errno != EAGAIN)
        return 0;
    if (sent < 0)
        sent = 0;
    if (length || connection->kept)
        keep(connection, text + sent, length - sent, answers - sent);
    if (was_blocked != (connection->unsent > 0))
        watch(epoll, EPOLL_CTL_MOD, connection, connection->unsent ? EPOLLOUT : EPOLLIN);
    return 1;
}

static int readable(int epoll, struct connection *connection)
{
    size_t held = connection->length;
    if (held)
        memcpy(buffer, connection->kept, held);
    ssize_t received = recv(connection->fd, buffer + held, BUFFER_SIZE - held, 0);
    if (received <= 0)
        return received < 0 && errno == EAGAIN;
    size_t length = held + received;
    char *newline = memrchr(buffer + held, '\n', received);
    size_t complete = newline ? (size_t)(newline - buffer) + 1 : length == BUFFER_SIZE ? length : 0;
    upper(buffer, complete);
    return answer(epoll, connection, buffer, length, complete);
}

static int writable(int epoll, struct connection *connection)
{
    return answer(epoll, connection, connection->kept, connection->length, connection->unsent);
}

static int listen_on(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 4096) < 0)
        err(1, "cannot listen on port %d", port);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        errx(2, "usage: %s PORT", argv[0]);
    struct connection listener = {.fd = listen_on(atoi(argv[1]))};
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(epoll, EPOLL_CTL_ADD, &listener, EPOLLIN);
    for (;;) {
        struct epoll_event events[EVENTS_PER_TURN];
        int count = epoll_wait(epoll, events, EVENTS_PER_TURN, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (connection == &listener)
                accept_all(epoll, listener.fd);
            else if (!(connection->unsent ? writable : readable)(epoll, connection))
                drop(connection);
        }
    }
}
