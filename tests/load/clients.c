/* Keeps many connections to a line server busy, and counts all that a client could complain of.
 *
 * Each connection has one of the habits below and gets a turn once a round; received is whenever
 * something comes. Connection i sends from another place of the text on: an answer that went to
 * the wrong connection, or came twice, or not, is a wrong answer. A connection that ends is opened
 * again at its next turn. It may begin with a header, as one from a load balancer does, in several
 * pieces, and may have to be greeted.
 *
 * Each line on standard input asks for a report, one JSON object. One with an "m" marks the moment
 * besides: reports tell who still waits for an answer since then, which connections are left that
 * were open then, and which ended without an answer to what had reached the server by then. At end
 * of input all connections are ended from this side, and after their last answers comes the last
 * report.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <err.h>
#include <errno.h>
#include <getopt.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CHUNK = 64 * 1024,          /* sent or received at a time */
    TICK_MS = 5,                /* between two looks at whose turn it is */
    END_SECONDS = 30,           /* for the last answers */
    HEADER_STEP = 20,           /* bytes of the header sent in a turn */
    PORTS_PER_SOURCE = 4096,
    SPARE_DESCRIPTORS = 16,
};

static struct {
    int port, connections;
    double round; /* seconds */
    const char *header, *greeting;
} option = {.connections = 1000, .round = 1, .header = "", .greeting = ""};

/* ---- what is said ---- */

/* Lines of different lengths, repeated without end. For each byte of it: the answer to it, how
 * many bytes its line has before it, and how many from it on, with the newline. */
struct text {
    size_t size;
    char *question, *answer; /* a CHUNK longer than `size`, so that a chunk may run over the end */
    size_t *before, *rest;
};

static struct text short_lines, long_lines;

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        err(1, "calloc");
    return memory;
}

/* Every byte value but newline occurs, most are letters; bytes above 127 must come back as is. */
static void make_text(struct text *text, size_t size, size_t shortest, size_t longest)
{
    size_t all = size + CHUNK, length = 0;
    *text = (struct text){.size = size, .question = allocate(all, 1), .answer = allocate(all, 1),
                          .before = allocate(size, sizeof(size_t)),
                          .rest = allocate(size, sizeof(size_t))};
    for (size_t i = 0; i < size; i++) {
        bool full = length >= shortest + i * 31 % (longest - shortest);
        int byte = i % 11 ? 'a' + i * 7 % 26 : (int)(i / 11 % 256);
        text->question[i] = full || i == size - 1 ? '\n' : byte == '\n' ? '.' : byte;
        text->before[i] = length;
        length = text->question[i] == '\n' ? 0 : length + 1;
    }
    for (size_t i = size; i-- > 0;)
        text->rest[i] = text->question[i] == '\n' ? 1 : text->rest[i + 1] + 1;
    for (size_t i = 0; i < all; i++) {
        text->question[i] = text->question[i % size];
        text->answer[i] = isascii((unsigned char)text->question[i])
                              ? toupper(text->question[i]) : text->question[i];
    }
}

/* ---- who says it ---- */

struct habit {
    const struct text *text;
    size_t step;   /* bytes sent in a turn; 0: up to the end of the line */
    size_t ahead;  /* sends no more while so much is unanswered */
    size_t sip;    /* bytes read in a turn; 0: all that comes, when it comes */
    size_t enough; /* after so many bytes it half-closes and reads to the end; 0: never */
    int share;     /* connections out of 500 */
};

/* Those that read slowly let the server sit on answers that it cannot send, and leave it in the
 * middle of a long line. For this the kernel's buffers must be small (net.ipv4.tcp_wmem): by
 * default a few megabytes fit in between on the loopback device. */
static const struct habit habits[] = {
    {.text = &long_lines, .step = 384 * 1024, .ahead = 64 * 1024, .sip = 96 * 1024, .share = 2},
    {.text = &long_lines, .step = 384 * 1024, .ahead = 64 * 1024, .sip = 96 * 1024,
     .enough = 384 * 1024, .share = 2},
    {.text = &short_lines, .ahead = 1, .enough = 1, .share = 11}, /* one line, and again */
    {.text = &short_lines, .step = 16 * 1024, .ahead = 4096, .share = 25}, /* pipelined */
    {.text = &short_lines, .step = 40, .ahead = CHUNK, .share = 160},      /* in pieces */
    {.text = &short_lines, .ahead = 1, .share = 300},                      /* line by line */
};

struct connection {
    const struct habit *habit;
    size_t start;                /* where in the text it begins */
    int fd;                      /* -1: to be opened at the next turn */
    bool open, half_closed, marked;
    int error;                   /* met in sending */
    size_t introduced, greeted;  /* bytes of the header sent, and of the greeting received */
    size_t wanted, sent, received;
    size_t owed;                 /* bytes of answers that were due when the moment was marked */
    uint64_t waits_since;        /* nanoseconds; 0: nothing is due */
};

static int epoll, open_now, in_use; /* open_now is without those that soon hang up */
static bool ending;
static uint64_t now, marked_at, longest_silence;
static uintmax_t opened, refused, reset, ended, wrong, lost, bytes;
static struct connection *all;

static void read_clock(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    now = time.tv_sec * 1000000000ull + time.tv_nsec;
}

static size_t place(const struct connection *c, size_t position)
{
    return (c->start + position) % c->habit->text->size;
}

/* How many of `count` bytes must be answered: all whole lines, and after end of input everything. */
static size_t due(const struct connection *c, size_t count)
{
    size_t unfinished = c->habit->text->before[place(c, count)];
    if (c->half_closed && count == c->sent)
        return count;
    return unfinished < count ? count - unfinished : 0;
}

static bool is_introduced(const struct connection *c)
{
    return !option.header[c->introduced];
}

static bool is_greeted(const struct connection *c)
{
    return !option.greeting[c->greeted];
}

/* Who reads slowly makes the silence himself, so his is not counted. */
static void wait_for_answer(struct connection *c)
{
    bool unheard = is_introduced(c) && !is_greeted(c);
    bool waits = !c->habit->sip && (!c->open || unheard || c->received < due(c, c->sent));
    if (waits && !c->waits_since)
        c->waits_since = now;
}

static void count_silence(const struct connection *c)
{
    if (c->waits_since && now - c->waits_since > longest_silence)
        longest_silence = now - c->waits_since;
}

static void leave(struct connection *c)
{
    if (c->received < c->owed)
        lost++;
    open_now -= c->open && !c->habit->enough;
    in_use--;
    close(c->fd);
    c->fd = -1;
    c->marked = false;
    c->waits_since = 0;
}

static void fail(struct connection *c, int error)
{
    if (error == ECONNREFUSED)
        refused++;
    else
        reset++;
    leave(c);
}

/* A fresh source address every few thousand connections, or the ports would run out: those that
 * were used are in TIME_WAIT for a minute. */
static void choose_source(int fd)
{
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 256 + opened / PORTS_PER_SOURCE % 65536);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        err(1, "bind");
}

/* Segments as on Ethernet, too: with those of the loopback device a small window moves by fits. */
static void make_narrow(int fd, int size)
{
    int segment = 1400;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
}

static void connect_to_server(struct connection *c)
{
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(option.port)};
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    int on = 1;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *c = (struct connection){.habit = c->habit, .start = c->start};
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0)
        err(1, "socket");
    in_use++;
    opened++;
    choose_source(c->fd);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (c->habit->sip)
        make_narrow(c->fd, c->habit->sip);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        err(1, "epoll_ctl");
    wait_for_answer(c);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        fail(c, errno);
}

static void send_header(struct connection *c, size_t most)
{
    size_t rest = strlen(option.header + c->introduced);
    ssize_t count = send(c->fd, option.header + c->introduced, rest < most ? rest : most,
                         MSG_NOSIGNAL);
    if (count > 0)
        c->introduced += count;
    else if (count < 0 && errno != EAGAIN)
        c->error = errno;
    wait_for_answer(c);
}

static void send_wanted(struct connection *c)
{
    if (!is_introduced(c)) {
        if (!ending)
            return;
        send_header(c, SIZE_MAX);
    }
    while (c->sent < c->wanted) {
        size_t rest = c->wanted - c->sent;
        const char *from = c->habit->text->question + place(c, c->sent);
        ssize_t count = send(c->fd, from, rest < CHUNK ? rest : CHUNK, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN)
            break;
        if (count < 0) { /* there may still be answers to receive */
            c->error = errno;
            return;
        }
        c->sent += count;
    }
    bool enough = ending || (c->habit->enough && c->sent >= c->habit->enough);
    if (c->sent == c->wanted && enough && !c->half_closed) {
        c->half_closed = true;
        shutdown(c->fd, SHUT_WR);
    }
    wait_for_answer(c);
}

/* How many bytes of what was received are part of the greeting. */
static size_t greeting_in(struct connection *c, const char *answer, size_t count)
{
    size_t size = 0;
    while (size < count && !is_greeted(c) && answer[size] == option.greeting[c->greeted]) {
        c->greeted++;
        size++;
    }
    return size;
}

static void check(struct connection *c, const char *answer, size_t count)
{
    size_t greeting = greeting_in(c, answer, count);
    const char *expected = c->habit->text->answer + place(c, c->received);
    bytes += count;
    answer += greeting;
    count -= greeting;
    c->received += count;
    bool early = c->received > due(c, c->sent) || (count && !is_greeted(c));
    if (early || memcmp(answer, expected, count)) {
        wrong++;
        leave(c);
        return;
    }
    count_silence(c);
    c->waits_since = 0;
    wait_for_answer(c);
}

static void end_of_answers(struct connection *c)
{
    count_silence(c);
    if (!c->half_closed || c->received < c->sent || !is_greeted(c))
        ended++;
    leave(c);
}

static void receive(struct connection *c, size_t most)
{
    static char answer[CHUNK];
    while (c->fd >= 0 && most > 0) {
        ssize_t count = recv(c->fd, answer, most < CHUNK ? most : CHUNK, 0);
        if (count < 0 && errno == EAGAIN)
            return;
        if (count < 0)
            fail(c, errno);
        else if (count == 0 && c->error == ECONNRESET) /* which recv(2) would have said */
            fail(c, c->error);
        else if (count == 0)
            end_of_answers(c);
        else
            check(c, answer, count);
        most -= count > 0 ? (size_t)count : 0;
    }
}

static void take_turn(struct connection *c)
{
    if (c->fd < 0) {
        connect_to_server(c);
        return;
    }
    if (c->habit->sip)
        receive(c, c->habit->sip);
    if (c->fd >= 0 && c->open && !is_introduced(c) && !ending)
        send_header(c, HEADER_STEP);
    else if (c->fd >= 0 && c->open && !c->half_closed && c->wanted - c->received < c->habit->ahead) {
        size_t line = c->habit->text->rest[place(c, c->wanted)];
        c->wanted += c->habit->step ? c->habit->step : line;
        send_wanted(c);
    }
}

static void handle_events(struct connection *c, uint32_t events)
{
    if (c->fd < 0)
        return;
    if (!c->open && !(events & (EPOLLERR | EPOLLHUP))) {
        c->open = true;
        open_now += !c->habit->enough;
        count_silence(c);
        c->waits_since = 0;
        take_turn(c);
    } else if (c->open && events & EPOLLOUT)
        send_wanted(c);
    if (!c->open || !c->habit->sip || ending)
        receive(c, SIZE_MAX);
}

/* ---- the run ---- */

/* The server owes an answer to what its kernel has acknowledged; of the rest it cannot know. */
static void mark(void)
{
    marked_at = now;
    for (int i = 0; i < option.connections; i++) {
        struct connection *c = &all[i];
        int unacknowledged = 0;
        if (c->fd < 0 || ioctl(c->fd, SIOCOUTQ, &unacknowledged) < 0)
            continue;
        c->marked = true;
        /* What is not acknowledged may be of the header. */
        c->owed = (size_t)unacknowledged < c->sent ? due(c, c->sent - unacknowledged) : 0;
    }
}

static void report(void)
{
    int remaining = 0, waiting = 0;
    for (int i = 0; i < option.connections; i++) {
        count_silence(&all[i]);
        remaining += all[i].marked;
        waiting += all[i].waits_since && all[i].waits_since <= marked_at;
    }
    printf("{\"open\": %d, \"remaining\": %d, \"waiting\": %d, \"opened\": %ju, \"bytes\": %ju, ",
           open_now, remaining, waiting, opened, bytes);
    printf("\"refused\": %ju, \"reset\": %ju, \"ended\": %ju, \"wrong\": %ju, \"lost\": %ju, ",
           refused, reset, ended, wrong, lost);
    printf("\"silence\": %.6f}\n", longest_silence / 1e9);
    fflush(stdout);
    longest_silence = 0;
}

/* True if there is no end of input yet. */
static bool answer_requests(void)
{
    char requests[256];
    ssize_t count = read(STDIN_FILENO, requests, sizeof requests);
    for (ssize_t i = 0; i < count; i++)
        if (requests[i] == 'm')
            mark();
        else if (requests[i] == '\n')
            report();
    return count > 0;
}

static void wait_for_events(void)
{
    struct epoll_event events[64];
    int count = epoll_wait(epoll, events, 64, TICK_MS);
    read_clock();
    for (int i = 0; i < count; i++)
        if (events[i].data.ptr)
            handle_events(events[i].data.ptr, events[i].events);
        else if (!ending)
            ending = !answer_requests();
}

/* The turns are spread evenly over the round. Turns that are more than a round late are left out. */
static void take_turns(uint64_t began)
{
    static uint64_t taken;
    uint64_t round = option.round * 1e9;
    uint64_t turns = (now - began) / 1000 * option.connections / (round / 1000);
    if (turns > taken + option.connections)
        taken = turns - option.connections;
    for (; taken < turns; taken++)
        take_turn(&all[taken % option.connections]);
}

static void end_all(void)
{
    uint64_t deadline = now + END_SECONDS * 1000000000ull;
    for (int i = 0; i < option.connections; i++)
        if (all[i].fd >= 0 && all[i].open)
            handle_events(&all[i], EPOLLOUT);
    while (in_use > 0 && now < deadline)
        wait_for_events();
    report();
    if (in_use > 0)
        errx(1, "%d connections have not ended within %d s", in_use, END_SECONDS);
}

static void make_connections(void)
{
    struct rlimit limit;
    all = allocate(option.connections, sizeof *all);
    for (int i = 0; i < option.connections; i++) {
        int number = i % 500, kind = 0;
        while (number >= habits[kind].share)
            number -= habits[kind++].share;
        all[i] = (struct connection){.habit = &habits[kind], .fd = -1, .start = i * 7919ul};
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < (rlim_t)option.connections + SPARE_DESCRIPTORS)
        errx(2, "only %ju descriptors can be open", (uintmax_t)limit.rlim_cur);
}

static char *with_newline(const char *line, const char *newline)
{
    char *text = allocate(strlen(line) + strlen(newline) + 1, 1);
    return strcat(strcpy(text, line), newline);
}

static void parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"port", 1, 0, 'p'}, {"connections", 1, 0, 'c'}, {"round", 1, 0, 'r'},
        {"header", 1, 0, 'h'}, {"greeting", 1, 0, 'g'}, {0, 0, 0, 0}};
    for (int name; (name = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        if (name == 'p') option.port = atoi(optarg);
        else if (name == 'c') option.connections = atoi(optarg);
        else if (name == 'r') option.round = atof(optarg);
        else if (name == 'h') option.header = with_newline(optarg, "\r\n");
        else if (name == 'g') option.greeting = with_newline(optarg, "\n");
        else exit(2);
    }
    if (option.port <= 0 || option.connections < 1 || option.round < 0.001)
        errx(2, "usage: %s --port PORT [--connections N] [--round SECONDS] [--header LINE]"
             " [--greeting LINE]", argv[0]);
}

int main(int argc, char **argv)
{
    struct epoll_event input = {.events = EPOLLIN, .data.ptr = NULL};
    parse_options(argc, argv);
    make_text(&short_lines, 60000, 1, 150);
    make_text(&long_lines, 1000000, 20000, 60000);
    make_connections();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &input) < 0)
        err(2, "standard input must be a pipe or a terminal");
    read_clock();
    for (uint64_t began = now; !ending;) {
        wait_for_events();
        take_turns(began);
    }
    end_all();
}
