/* A server whose every request burns CPU time at the end of a chain of calls that is known, built without frame pointers.

   /direct   40 levels, then the fire
   /sorted   40 levels, the C library's sort, its callback, the fire
   /signal   40 levels, a signal, its handler, the fire
   /plugin   40 levels, a library that the first such request loads, back into the server, the fire
   /linked   40 levels, the fire, which calls functions of another library all the time, through the linkage table
   The answer's body is the CPU time that the fire took, in ns. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const uint64_t BURN_NS = 400000000;
static volatile uint64_t sink;
static uint64_t burned;
static void (*end)(void);

static uint64_t cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Leaves that have no frame at all, that have a small one, and that have a large one. */
__attribute__((noinline)) static uint64_t bare(uint64_t x)
{
    for (int i = 0; i < 200; i++)
        x = x * 6364136223846793005u + 1442695040888963407u;
    return x;
}

__attribute__((noinline)) static uint64_t spilling(uint64_t x)
{
    volatile uint64_t room[600];
    for (int i = 0; i < 600; i++)
        room[i] = bare(x + i) ^ x;
    return room[x % 600];
}

__attribute__((noinline)) static void fire(void)
{
    uint64_t begun = cpu_ns(), x = begun;
    while (cpu_ns() - begun < BURN_NS)
        for (int i = 0; i < 20; i++)
            x += spilling(x);
    sink += x;
    burned = cpu_ns() - begun;
}

__attribute__((noinline)) static void linked_fire(void)
{
    uint64_t begun = cpu_ns();
    double x = 1;
    while (cpu_ns() - begun < BURN_NS)
        for (int i = 0; i < 2000; i++)
            x += fmod(x * 1.7 + cbrt(x + i), 3.5);
    sink += (uint64_t)x;
    burned = cpu_ns() - begun;
}

/* Levels of two kinds by turns: the compiler keeps what they hold in registers, or on the stack. */
#define ODD(n, next)                                                                                                   \
    __attribute__((noinline)) static void level_##n(void)                                                             \
    {                                                                                                                  \
        uint64_t a = sink, b = sink, c = sink, d = sink, e = sink, f = sink;                                          \
        next();                                                                                                        \
        sink += a ^ b ^ c ^ d ^ e ^ f;                                                                                \
    }
#define EVEN(n, next)                                                                                                  \
    __attribute__((noinline)) static void level_##n(void)                                                             \
    {                                                                                                                  \
        volatile char room[16 + n * 40];                                                                              \
        room[n] = 1;                                                                                                  \
        next();                                                                                                        \
        room[0] = room[n];                                                                                            \
    }
__attribute__((noinline)) static void at_end(void)
{
    end();
    sink++;
}
ODD(40, at_end) EVEN(39, level_40) ODD(38, level_39) EVEN(37, level_38) ODD(36, level_37) EVEN(35, level_36)
ODD(34, level_35) EVEN(33, level_34) ODD(32, level_33) EVEN(31, level_32) ODD(30, level_31) EVEN(29, level_30)
ODD(28, level_29) EVEN(27, level_28) ODD(26, level_27) EVEN(25, level_26) ODD(24, level_25) EVEN(23, level_24)
ODD(22, level_23) EVEN(21, level_22) ODD(20, level_21) EVEN(19, level_20) ODD(18, level_19) EVEN(17, level_18)
ODD(16, level_17) EVEN(15, level_16) ODD(14, level_15) EVEN(13, level_14) ODD(12, level_13) EVEN(11, level_12)
ODD(10, level_11) EVEN(9, level_10) ODD(8, level_9) EVEN(7, level_8) ODD(6, level_7) EVEN(5, level_6)
ODD(4, level_5) EVEN(3, level_4) ODD(2, level_3) EVEN(1, level_2)

__attribute__((noinline)) static int compare(const void *a, const void *b)
{
    static __thread int once;
    if (!once) {
        once = 1;
        fire();
    }
    int order = *(const int *)a - *(const int *)b;
    if (order == 1)
        once = 0;
    return order;
}

__attribute__((noinline)) static void sorted(void)
{
    int numbers[2] = {2, 1};
    qsort(numbers, 2, sizeof numbers[0], compare);
    sink += numbers[0];
}

__attribute__((noinline)) static void handler(int number)
{
    fire();
    sink += number;
}

__attribute__((noinline)) static void signalled(void)
{
    raise(SIGUSR1);
    sink++;
}

static const char *library;

__attribute__((noinline)) static void plugged(void)
{
    void *handle = dlopen(library, RTLD_NOW);
    void (*plugin)(void (*)(void)) = handle ? (void (*)(void (*)(void)))dlsym(handle, "plugin") : 0;
    if (!plugin)
        abort();
    plugin(fire);
    sink++;
}

__attribute__((noinline)) static void serve(int client)
{
    static __thread char request[4096], answer[256];
    ssize_t size = recv(client, request, sizeof request - 1, 0);
    if (size <= 0)
        return;
    request[size] = 0;
    end = fire;
    if (strstr(request, "/sorted"))
        end = sorted;
    else if (strstr(request, "/signal"))
        end = signalled;
    else if (strstr(request, "/plugin"))
        end = plugged;
    else if (strstr(request, "/linked"))
        end = linked_fire;
    level_1();
    char body[32];
    int length = snprintf(body, sizeof body, "%llu", (unsigned long long)burned);
    int all = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
                       length, body);
    send(client, answer, all, 0);
    close(client);
}

static void *thread(void *arg)
{
    serve((int)(intptr_t)arg);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    library = argv[2];
    int threads = strcmp(argv[3], "threads") == 0;
    struct sigaction action = {.sa_handler = handler};
    sigaction(SIGUSR1, &action, 0);
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 16))
        return 1;
    for (;;) {
        int client = accept(listener, 0, 0);
        if (client < 0)
            continue;
        if (threads) {
            pthread_t id;
            pthread_create(&id, 0, thread, (void *)(intptr_t)client);
            pthread_detach(id);
        } else {
            serve(client);
        }
    }
}
