/* Keeps a line server busy, checks every byte that it answers, and says how much and how late.
 *
 * One thread and one epoll, so that it stays cheaper than any server it loads. Each connection
 * sends a batch of lines, waits for the whole answer, and sends the next batch. Connection i sends
 * from line i of the text on: an answer that went to the wrong connection is a wrong answer.
 *
 * With --stream, it sends the batch again and again without waiting, in pieces of any size, so that
 * what the server receives ends anywhere in a line. With --churn, each batch has a connection of
 * its own, which the client ends; with --reset, it ends it by a reset.
 *
 * It prints a line when it is ready, waits for one, and prints one JSON object; when its input has
 * ended, it closes the idle connections. It exits with 1 on the first wrong byte, on an error and
 * on silence.
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
    WINDOW = 256 * 1024,   /* bytes of a stream whose answers are due: a slow server has to end, too */
    SOURCE_SHARE = 4096,   /* connections in a row from one source address, unless --sources says it */
    GRACE_SECONDS = 20,    /* for answers that are still due when the time is over */
    PROBE_LINE = 64,
};

struct connection {
    int fd;
    size_t lines, size;             /* of one batch; size in bytes, SIZE_MAX while it streams */
    size_t text;                    /* bytes of the text of a batch */
    const char *request, *expected; /* the batch and its answer */
    size_t sent, received;          /* bytes of the batch under way */
    uint64_t began;                 /* when the batch did, nanoseconds; 0: no answer is due */
};

static struct {
    const char *host;
    int port, connections, churn, reset, stream, probe, sources, idle;
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
    uint32_t number = option.sources ? count % option.sources : count / SOURCE_SHARE % 4096;
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    count++;
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 256 + number);
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
    if (option.churn || option.sources)
        choose_source(c->fd);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        err(1, "connect");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        err(1, "epoll_ctl");
}

/* Without TIME_WAIT: the client's end is gone at once. */
static void close_by_reset(int fd)
{
    struct linger now = {.l_onoff = 1};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

/* Bytes of the next piece of a stream: the same sequence for every server. */
static size_t piece(void)
{
    static uint32_t state = 1;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return 1 + state % CHUNK;
}

static void receive_answer(struct connection *c);

static void send_batch(struct connection *c)
{
    while (c->sent < c->size) {
        size_t at = c->sent % c->text, rest = c->text - at, most = CHUNK;
        if (c->size == SIZE_MAX) {
            if (c->sent - c->received >= WINDOW)
                return; /* until an answer has come */
            most = piece();
            if (now() >= deadline) /* complete the line */
                c->size = c->sent + option.line - at % option.line;
        }
        if (rest > c->size - c->sent)
            rest = c->size - c->sent;
        ssize_t count = send(c->fd, c->request + at, rest < most ? rest : most, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0)
            err(1, "send");
        c->sent += count;
        if (probe && c != probe)
            receive_answer(probe);
    }
    if (option.churn && !option.reset)
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
    lines += option.stream && c != probe ? c->size / option.line : c->lines;
    if (c == probe || !(probe || option.stream))
        count_latency(time - c->began);
    c->began = 0;
    if (option.reset)
        close_by_reset(c->fd);
    else if (option.churn)
        close(c->fd);
    if (time < deadline)
        begin_batch(c, time);
}

/* Whether this is the answer to a part of what has been sent, which may be sent again and again. */
static int is_right(const struct connection *c, const char *answer, size_t count)
{
    if (count > c->sent - c->received)
        return 0;
    for (size_t done = 0, part; done < count; done += part) {
        size_t at = (c->received + done) % c->text, rest = c->text - at;
        part = count - done < rest ? count - done : rest;
        if (memcmp(answer + done, c->expected + at, part))
            return 0;
    }
    return 1;
}

/* A batch ends with its last byte; with --churn, with the end of file after it. */
static void receive_answer(struct connection *c)
{
    static char answer[CHUNK];
    if (!c->began)
        return;
    while (c->received < c->size || (option.churn && !option.reset)) {
        ssize_t count = recv(c->fd, answer, sizeof answer, 0);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0)
            err(1, "recv");
        if (count == 0 && c->received < c->size)
            errx(1, "connection closed after %zu of %zu bytes", c->received, c->size);
        if (count == 0)
            break;
        if (!is_right(c, answer, count))
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
        {"reset", 0, 0, 'R'}, {"stream", 0, 0, 'S'}, {"sources", 1, 0, 'a'}, {"idle", 1, 0, 'i'},
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
        else if (name == 'R') option.churn = option.reset = 1;
        else if (name == 'S') option.stream = 1;
        else if (name == 'a') option.sources = atoi(optarg);
        else if (name == 'i') option.idle = atoi(optarg);
        else exit(2);
    }
    if (option.port <= 0 || option.connections < 1 || option.line < 2 || option.depth < 1)
        errx(2, "usage: %s --port PORT [--host ADDRESS] [--connections N] [--line BYTES] "
                "[--depth LINES] [--seconds S] [--churn | --reset | --stream] [--probe] "
                "[--sources N] [--idle N]", argv[0]);
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
        all[i] = (struct connection){.lines = option.depth,
                                     .size = option.stream ? SIZE_MAX : option.depth * option.line,
                                     .text = option.depth * option.line,
                                     .request = request + i * option.line,
                                     .expected = expected + i * option.line};
    if (option.probe) {
        probe = &all[option.connections++];
        *probe = (struct connection){.lines = 1, .size = PROBE_LINE, .text = PROBE_LINE,
                                     .request = make_text(PROBE_LINE, 1, unchanged),
                                     .expected = make_text(PROBE_LINE, 1, toupper)};
    }
    return all;
}

/* Connections that have each had one line answered, and stay open. */
static int *open_idle(void)
{
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(option.port)};
    int *idle_ones = calloc(option.idle + 1, sizeof *idle_ones);
    char answer[2];
    inet_pton(AF_INET, option.host, &server.sin_addr);
    for (int i = 0; i < option.idle; i++) {
        int fd = idle_ones[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof server) < 0)
            err(1, "idle connection %d", i);
        if (send(fd, "a\n", 2, MSG_NOSIGNAL) != 2 || recv(fd, answer, 2, MSG_WAITALL) != 2
            || memcmp(answer, "A\n", 2))
            errx(1, "no answer on idle connection %d", i);
    }
    return idle_ones;
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

static void say(const char *text)
{
    fputs(text, stdout);
    fflush(stdout);
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
        if (option.stream && c->began && c->sent < c->size)
            send_batch(c);
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
    alarm(option.seconds + 3 * GRACE_SECONDS);
    int *idle_ones = open_idle();
    say("ready\n");
    getchar();
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
    say("");
    getchar();
    for (int i = 0; i < option.idle; i++)
        close_by_reset(idle_ones[i]);
}
