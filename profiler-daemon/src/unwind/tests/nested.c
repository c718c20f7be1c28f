/* A stack of known shape, described by the unwinder of the C library itself.

   main -> down() some times over, with frames of all kinds -> qsort and its callback -> a signal and its handler ->
   deepest(), which prints what backtrace() says, one address a line, and stops. */
#define _GNU_SOURCE
#include <alloca.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <unistd.h>

static volatile int sink;

__attribute__((noinline)) static void deepest(void)
{
    void *addresses[600];
    int count = backtrace(addresses, 600);
    for (int at = 0; at < count; at++)
        printf("%p\n", addresses[at]);
    printf("deepest %p\n", (void *)deepest);
    printf("end\n");
    fflush(stdout);
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    sink++;
}

__attribute__((noinline)) static void handler(int signal)
{
    deepest();
    sink += signal;
}

__attribute__((noinline)) static int compare(const void *a, const void *b)
{
    static int once;
    if (!once) {
        once = 1;
        raise(SIGUSR1);
    }
    return *(const int *)a - *(const int *)b;
}

/* A frame of a size that the compiler does not know: it needs a frame pointer. */
__attribute__((noinline)) static void variable(int n, void (*next)(int))
{
    char *room = alloca(16 + (size_t)n * 8);
    memset(room, n, 16);
    next(n - 1);
    sink += room[0];
}

/* A frame that aligns the stack further than its caller did. */
__attribute__((noinline)) static void aligned(int n, void (*next)(int))
{
    char room[64] __attribute__((aligned(64)));
    memset(room, n, sizeof room);
    next(n - 1);
    sink += room[n & 63];
}

/* A large frame. */
__attribute__((noinline)) static void large(int n, void (*next)(int))
{
    char room[20000];
    memset(room, n, sizeof room);
    next(n - 1);
    sink += room[n];
}

/* Many registers that are saved, so that the frame pointer's is reused. */
__attribute__((noinline)) static void busy(int n, void (*next)(int))
{
    int a = sink, b = sink, c = sink, d = sink, e = sink, f = sink;
    next(n - 1);
    sink += a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6;
    next = 0;
}

static void down(int n)
{
    if (n == 0) {
        int numbers[4] = {3, 1, 2, 0};
        qsort(numbers, 4, sizeof numbers[0], compare);
        sink += numbers[0];
        return;
    }
    switch (n % 4) {
    case 0:
        variable(n, down);
        break;
    case 1:
        aligned(n, down);
        break;
    case 2:
        large(n, down);
        break;
    default:
        busy(n, down);
    }
    sink++;
}

static void *thread(void *arg)
{
    down(*(int *)arg);
    return 0;
}

int main(int argc, char **argv)
{
    int depth = argc > 1 ? atoi(argv[1]) : 20;
    struct sigaction action = {.sa_handler = handler};
    static char other[1 << 16];
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    if (argc > 2 && strcmp(argv[2], "stack") == 0) {
        sigaltstack(&stack, 0);
        action.sa_flags = SA_ONSTACK;
    }
    sigaction(SIGUSR1, &action, 0);
    if (argc > 2 && strcmp(argv[2], "thread") == 0) {
        pthread_t id;
        pthread_create(&id, 0, thread, &depth);
        pthread_join(id, 0);
    } else {
        down(depth);
    }
    return 0;
}
