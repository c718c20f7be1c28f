/* One thread that serves and waits with epoll: waiting PORT MODE

   Each request waits 60 ms, of which it burns none. Meanwhile `nobodys` burns whenever the thread wakes.

   registered   the connection does not block, and epoll waits for it all the while
   asked        the connection does not block, is asked first, and is in no epoll set while the request is served
   inside       the connection blocks; the epoll instance is the request's own, and so is what burns: `ours` */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static volatile unsigned long work;

static int64_t cpu(void) {
    struct timespec at;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &at);
    return at.tv_sec * 1000000000ll + at.tv_nsec;
}
__attribute__((noinline)) void nobodys(void) {
    for (int64_t end = cpu() + 5000000; cpu() < end;) work++;
}
__attribute__((noinline)) void ours(void) {
    for (int64_t end = cpu() + 5000000; cpu() < end;) work++;
}

static void watch(int epoll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* Six times 10 ms, each waited for with epoll. */
static void wait_within(int epoll, void (*burn)(void)) {
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    struct itimerspec every = {{0, 10000000}, {0, 10000000}};
    timerfd_settime(timer, 0, &every, 0);
    watch(epoll, timer);
    for (int n = 0; n < 6; n++) {
        struct epoll_event event;
        uint64_t times;
        epoll_wait(epoll, &event, 1, -1);
        if (event.data.fd == timer) (void)!read(timer, &times, sizeof times);
        burn();
    }
    close(timer);
}

int main(int count, char **arguments) {
    int registered = !strcmp(arguments[2], "registered"), inside = !strcmp(arguments[2], "inside");
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1, loop = epoll_create1(0);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[1]))};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (count != 3 || bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 64)) return 1;
    for (;;) {
        char head[4096];
        const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        int fd = accept4(listener, 0, 0, inside ? 0 : SOCK_NONBLOCK);
        if (registered) watch(loop, fd);
        ssize_t got;
        while ((got = recv(fd, head, sizeof head, 0)) < 0) usleep(1000);
        if (got > 0) {
            int own = inside ? epoll_create1(0) : loop;
            wait_within(own, inside ? ours : nobodys);
            if (inside) close(own);
            send(fd, answer, sizeof answer - 1, 0);
        }
        close(fd);
    }
}
