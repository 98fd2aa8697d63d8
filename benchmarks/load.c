/* Keeps a line server busy, checks every byte that it answers, and says how much and how late.
 *
 * One thread and one epoll, so that it stays cheaper than any server it loads. Each connection
 * sends a batch of lines, waits for the whole answer, and sends the next batch. Connection i sends
 * from line i of the text on: an answer that went to the wrong connection is a wrong answer.
 * It prints one JSON object. It exits with 1 on the first wrong byte, on an error and on silence.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <err.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CHUNK = 64 * 1024,     /* at most this much is sent or received between two looks at the probe */
    EVENTS_PER_TURN = 64,
    GRACE_SECONDS = 20,    /* for answers that are still due when the time is over */
    PROBE_LINE = 64,
};

struct connection {
    int fd;
    size_t lines, size;             /* of one batch; size in bytes */
    const char *request, *expected; /* the batch and its answer */
    size_t sent, received;          /* bytes of the batch under way */
    uint64_t began;                 /* when the batch did, nanoseconds; 0: no answer is due */
};

static struct {
    const char *host;
    int port, connections, churn, probe;
    size_t line, depth;
    double seconds;
} option = {.host = "127.0.0.1", .connections = 1, .line = 64, .depth = 1, .seconds = 1};

static int epoll, busy; /* busy: connections whose answer is due */
static uint64_t deadline, lines, batches, idle; /* idle: nanoseconds without anything to do */
static struct connection *probe;

/* ---- time and latency ---- */

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* 32 buckets for each power of two: a latency is known to 3 per cent. */
static uint64_t histogram[64 * 32];

static void count_latency(uint64_t nanoseconds)
{
    int shift = nanoseconds < 32 ? 0 : 58 - __builtin_clzll(nanoseconds);
    histogram[shift * 32 + (nanoseconds >> shift)]++;
    batches++;
}

static double percentile_us(double share)
{
    uint64_t seen = 0;
    for (int i = 0; i < 64 * 32; i++)
        if ((seen += histogram[i]) >= share * batches && seen) {
            int shift = i < 64 ? 0 : i / 32 - 1;
            return ((uint64_t)(i - shift * 32) << shift) / 1e3;
        }
    return 0;
}

/* ---- text ---- */

/* `count` lines of `line` bytes each, newline included; every other letter small. */
static char *make_text(size_t line, size_t count, int (*form)(int))
{
    static const char alphabet[] = "aBcDeFgHiJkLmNoPqRsTuVwXyZ 0123456789.";
    char *text = malloc(line * count);
    if (!text)
        err(1, "malloc");
    for (size_t i = 0; i < line * count; i++)
        text[i] = i % line == line - 1 ? '\n' : form(alphabet[(i + i / line * 7) % 38]);
    return text;
}

static int unchanged(int character) { return character; }

/* ---- connections ---- */

/* A fresh source address every few thousand connections: ports that are still in TIME_WAIT would
 * otherwise make connect() search ever longer, and the load generator the bottleneck. */
static void choose_source(int fd)
{
    static uint32_t count;
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 256 + count++ / 4096 % 4096);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        err(1, "bind");
}

static void open_connection(struct connection *c)
{
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(option.port)};
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    int on = 1;
    inet_pton(AF_INET, option.host, &server.sin_addr);
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0)
        err(1, "socket");
    if (option.churn)
        choose_source(c->fd);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        err(1, "connect");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        err(1, "epoll_ctl");
}

static void receive_answer(struct connection *c);

static void send_batch(struct connection *c)
{
    while (c->sent < c->size) {
        size_t rest = c->size - c->sent;
        ssize_t count = send(c->fd, c->request + c->sent, rest < CHUNK ? rest : CHUNK, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0)
            err(1, "send");
        c->sent += count;
        if (probe && c != probe)
            receive_answer(probe);
    }
    if (option.churn)
        shutdown(c->fd, SHUT_WR);
}

static void begin_batch(struct connection *c, uint64_t time)
{
    busy++;
    c->sent = c->received = 0;
    c->began = time;
    if (option.churn)
        open_connection(c);
    send_batch(c);
}

static void end_batch(struct connection *c)
{
    uint64_t time = now();
    busy--;
    lines += c->lines;
    if (!probe || c == probe)
        count_latency(time - c->began);
    c->began = 0;
    if (option.churn)
        close(c->fd);
    if (time < deadline)
        begin_batch(c, time);
}

/* A batch ends with its last byte; with --churn, with the end of file after it. */
static void receive_answer(struct connection *c)
{
    static char answer[CHUNK];
    if (!c->began)
        return;
    while (c->received < c->size || option.churn) {
        ssize_t count = recv(c->fd, answer, sizeof answer, 0);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0)
            err(1, "recv");
        if (count == 0 && c->received < c->size)
            errx(1, "connection closed after %zu of %zu bytes", c->received, c->size);
        if (count == 0)
            break;
        if (count > (ssize_t)(c->sent - c->received)
            || memcmp(answer, c->expected + c->received, count))
            errx(1, "wrong answer within %zd bytes from byte %zu on", count, c->received);
        c->received += count;
        if (probe && c != probe)
            receive_answer(probe);
    }
    end_batch(c);
}

/* ---- the run ---- */

static void parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"host", 1, 0, 'h'}, {"port", 1, 0, 'p'}, {"connections", 1, 0, 'c'}, {"line", 1, 0, 'l'},
        {"depth", 1, 0, 'd'}, {"seconds", 1, 0, 's'}, {"churn", 0, 0, 'r'}, {"probe", 0, 0, 'o'},
        {0, 0, 0, 0}};
    for (int name; (name = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        if (name == 'h') option.host = optarg;
        else if (name == 'p') option.port = atoi(optarg);
        else if (name == 'c') option.connections = atoi(optarg);
        else if (name == 'l') option.line = strtoul(optarg, NULL, 10);
        else if (name == 'd') option.depth = strtoul(optarg, NULL, 10);
        else if (name == 's') option.seconds = atof(optarg);
        else if (name == 'r') option.churn = 1;
        else if (name == 'o') option.probe = 1;
        else exit(2);
    }
    if (option.port <= 0 || option.connections < 1 || option.line < 2 || option.depth < 1)
        errx(2, "usage: %s --port PORT [--host ADDRESS] [--connections N] [--line BYTES] "
                "[--depth LINES] [--seconds S] [--churn] [--probe]", argv[0]);
}

/* The last connection is the probe: one line at a time beside the load of the others. Only its
 * latency is counted, and it is looked at after every chunk that they send or receive. */
static struct connection *make_connections(void)
{
    struct connection *all = calloc(option.connections + 1, sizeof *all);
    size_t count = option.connections + option.depth;
    char *request = make_text(option.line, count, unchanged);
    char *expected = make_text(option.line, count, toupper);
    for (int i = 0; i < option.connections; i++)
        all[i] = (struct connection){.lines = option.depth, .size = option.depth * option.line,
                                     .request = request + i * option.line,
                                     .expected = expected + i * option.line};
    if (option.probe) {
        probe = &all[option.connections++];
        *probe = (struct connection){.lines = 1, .size = PROBE_LINE,
                                     .request = make_text(PROBE_LINE, 1, unchanged),
                                     .expected = make_text(PROBE_LINE, 1, toupper)};
    }
    return all;
}

/* Looks again instead of sleeping: to wake a sleeper would cost the server time, and the less the
 * faster it is. A client on another machine costs it none. */
static int wait_for_events(struct epoll_event *events)
{
    uint64_t began = now(), time = began;
    int count;
    while (!(count = epoll_wait(epoll, events, EVENTS_PER_TURN, 0))) {
        time = now();
        if (time - began > GRACE_SECONDS * 1000000000ull)
            errx(1, "no answer for %d s", GRACE_SECONDS);
    }
    idle += time - began;
    return count;
}

static void serve_events(void)
{
    struct epoll_event events[EVENTS_PER_TURN];
    int count = wait_for_events(events);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (c->sent < c->size && events[i].events & EPOLLOUT)
            send_batch(c);
        if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
            receive_answer(c);
    }
}

static void print_result(uint64_t began)
{
    uint64_t time = now() - began;
    printf("{\"lines\": %ju, \"seconds\": %.6f, \"busy_seconds\": %.6f, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"p999_us\": %.1f}\n", (uintmax_t)lines, time / 1e9,
           (time - idle) / 1e9, percentile_us(0.5), percentile_us(0.99), percentile_us(0.999));
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    alarm(option.seconds + 2 * GRACE_SECONDS);
    epoll = epoll_create1(0);
    struct connection *all = make_connections();
    for (int i = 0; i < option.connections && !option.churn; i++)
        open_connection(&all[i]);
    uint64_t began = now();
    deadline = began + option.seconds * 1e9;
    for (int i = 0; i < option.connections; i++)
        begin_batch(&all[i], now());
    while (busy)
        serve_events();
    print_result(began);
}
