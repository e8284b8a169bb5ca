/* Changes its memory in one way after the other, each when the directory of the argument says so: the
   file do-N has the way, a place (a page of the area) and a number of pages. Built with gcc -pthread. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define PART (2L << 20)
#define PAGES (80L << 8)
#define PARTS 8
#define WORKERS 3
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

static char *area, *readable, *fresh, *parts;
static int tells[WORKERS + 1][2], answers[2];
static sigjmp_buf back;
extern char **environ;

struct order {
	long place, count, value;
};

static void die(const char *what)
{
	printf("failed: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	exit(1);
}

static void store(struct order o)
{
	for (long i = 0; i < o.count; i++)
		*(volatile long *)(area + (o.place + i * 37) % PAGES * PAGE + 64) = o.value + i;
}

static void *work(void *at)
{
	struct order o;
	int *tell = at;
	while (read(tell[0], &o, sizeof o) == sizeof o) {
		store(o);
		if (write(answers[1], "x", 1) != 1)
			break;
	}
	return NULL;
}

/* Stores into one page after the other, with pauses, for ever. */
static void *steady(void *at)
{
	struct order *o = at;
	for (long i = 0;; i++) {
		*(volatile long *)(area + (o->place + i % o->count * 61) % PAGES * PAGE + 64) = i;
		usleep(200);
	}
	return NULL;
}

/* Its time-out is written below its stack at each stop. */
static void *wait_long(void *unused)
{
	int ready = epoll_create1(0);
	struct epoll_event event;
	struct timespec hour = { 3600, 0 };
	for (;;)
		syscall(SYS_epoll_pwait2, ready, &event, 1, &hour, NULL, 0);
	return unused;
}

/* Writes to the memory of another process. */
static void reach(int from, pid_t whose)
{
	struct order o;
	munmap(area, PAGES * PAGE);
	munmap(parts, PARTS * PART);
	while (read(from, &o, sizeof o) == sizeof o) {
		struct iovec here = { &o.value, sizeof o.value };
		struct iovec there = { area + o.place * PAGE + 128, sizeof o.value };
		char ok = process_vm_writev(whose, &here, 1, &there, 1, 0) > 0 ? 'x' : '!';
		if (write(answers[1], &ok, 1) != 1)
			break;
	}
	_exit(0);
}

static void tell(int whom, struct order o)
{
	char answer;
	if (write(tells[whom][1], &o, sizeof o) != sizeof o || read(answers[0], &answer, 1) != 1)
		die("told");
	if (answer != 'x')
		die("not done");
}

static void handle(int signal)
{
	(void)signal;
	siglongjmp(back, 1);
}

static void futex(struct order o)
{
	static int mine;
	int *there = (int *)(area + o.place * PAGE + 256);
	int add = FUTEX_OP(FUTEX_OP_ADD, 3, FUTEX_OP_CMP_EQ, 12345);
	if (syscall(SYS_futex, &mine, FUTEX_WAKE_OP_PRIVATE, 1, 1L, there, add) < 0)
		die("futex");
}

static void do_it(const char *how, struct order o)
{
	char *at = area + o.place * PAGE;
	long len = o.count * PAGE;
	if (!strcmp(how, "nothing")) {
	} else if (!strcmp(how, "store")) {
		store(o);
	} else if (!strcmp(how, "touch")) {
		*(volatile long *)(parts + o.place * PART + 5 * PAGE) = o.value;
	} else if (!strcmp(how, "read")) {
		int fd = open("/proc/self/exe", O_RDONLY);
		if (pread(fd, at + 1000, len, o.value % 1000) <= 0)
			die("pread");
		close(fd);
	} else if (!strcmp(how, "load")) {
		volatile char sum = 0;
		for (long i = 0; i < len; i += PAGE)
			sum += at[i];
	} else if (!strcmp(how, "threads")) {
		for (int i = 0; i < WORKERS; i++)
			tell(i, (struct order){ o.place + 1000 * i, o.count, o.value });
	} else if (!strcmp(how, "steady")) {
		static struct order all;
		pthread_t thread;
		all = o;
		if (pthread_create(&thread, NULL, steady, &all))
			die("thread");
	} else if (!strcmp(how, "new thread")) {
		pthread_t thread;
		int once[2];
		if (pipe(once) || pthread_create(&thread, NULL, work, once))
			die("thread");
		char answer;
		if (write(once[1], &o, sizeof o) != sizeof o || read(answers[0], &answer, 1) != 1)
			die("told");
		close(once[1]);
		pthread_join(thread, NULL);
		close(once[0]);
	} else if (!strcmp(how, "reach")) {
		tell(WORKERS, o);
	} else if (!strcmp(how, "futex")) {
		futex(o);
	} else if (!strcmp(how, "zap")) {
		if (madvise(at, len, MADV_DONTNEED))
			die("madvise");
	} else if (!strcmp(how, "free")) {
		if (madvise(at, len, MADV_FREE))
			die("madvise");
	} else if (!strcmp(how, "guard")) {
		if (madvise(fresh + o.place * PAGE, len, MADV_GUARD_INSTALL))
			die("guard");
	} else if (!strcmp(how, "no guard")) {
		if (madvise(fresh + o.place * PAGE, len, MADV_GUARD_REMOVE))
			die("guard");
	} else if (!strcmp(how, "populate")) {
		if (madvise(at, len, MADV_POPULATE_WRITE))
			die("populate");
	} else if (!strcmp(how, "segv")) {
		if (!sigsetjmp(back, 1))
			*(volatile char *)readable = 1;
		store(o);
	} else if (!strcmp(how, "efault")) {
		int fd = open("/proc/self/exe", O_RDONLY);
		if (read(fd, readable, 10) >= 0)
			die("efault");
		close(fd);
		/* As many faults as are expected now, but one of them another. */
		futex(o);
	} else if (!strcmp(how, "guarded")) {
		int fd = open("/proc/self/exe", O_RDONLY);
		if (read(fd, fresh + o.count * PAGE, 10) >= 0)
			die("guarded");
		close(fd);
		futex(o);
	} else if (!strcmp(how, "fork")) {
		pid_t child = fork();
		if (!child) {
			store(o);
			_exit(0);
		}
		o.place++;
		store(o);
		waitpid(child, NULL, 0);
	} else if (!strcmp(how, "vfork")) {
		pid_t child = vfork();
		if (!child) {
			*(volatile long *)(at + 512) = o.value;
			_exit(0);
		}
		waitpid(child, NULL, 0);
	} else if (!strcmp(how, "spawn")) {
		char *args[] = { "true", NULL };
		pid_t child;
		if (posix_spawn(&child, "/bin/true", NULL, NULL, args, environ))
			die("spawn");
		waitpid(child, NULL, 0);
		store(o);
	} else if (!strcmp(how, "map")) {
		char *more = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		*more = 1;
		munmap(more, 8 * PAGE);
		store(o);
	} else if (!strcmp(how, "protect")) {
		mprotect(at, len, PROT_READ);
		mprotect(at, len, PROT_READ | PROT_WRITE);
		store(o);
	} else {
		die(how);
	}
}

int main(int count, char **args)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	area = mmap(NULL, PAGES * PAGE + PART, PROT_READ | PROT_WRITE, flags, -1, 0);
	readable = mmap(NULL, PAGE, PROT_READ, flags, -1, 0);
	fresh = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	parts = mmap(NULL, (PARTS + 1) * PART, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (count < 2 || parts == MAP_FAILED || area == MAP_FAILED || readable == MAP_FAILED || fresh == MAP_FAILED)
		die("begin");
	area += PART - (long)area % PART;
	parts += PART - (long)parts % PART;
	madvise(parts, PARTS * PART, MADV_NOHUGEPAGE);
	if (pipe(answers))
		die("pipe");
	for (int i = 0; i <= WORKERS; i++)
		if (pipe(tells[i]))
			die("pipe");
	pid_t me = getpid();
	if (!fork())
		reach(tells[WORKERS][0], me);
	for (long page = 0; page < PAGES; page++)
		*(long *)(area + page * PAGE) = page + 1;
	pthread_t thread;
	for (int i = 0; i < WORKERS; i++)
		if (pthread_create(&thread, NULL, work, tells[i]))
			die("thread");
	if (pthread_create(&thread, NULL, wait_long, NULL))
		die("thread");
	struct sigaction action = { .sa_handler = handle };
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	dprintf(1, "ready\n");
	for (long step = 1;; step++) {
		static char path[4096], line[200], how[100];
		struct order o = { .value = step * 1000 };
		snprintf(path, sizeof path, "%s/do-%ld", args[1], step);
		int fd;
		while ((fd = open(path, O_RDONLY)) < 0)
			usleep(500);
		long n = read(fd, line, sizeof line - 1);
		line[n > 0 ? n : 0] = 0;
		close(fd);
		if (sscanf(line, "%ld %ld %99[a-z ]", &o.place, &o.count, how) != 3)
			die("order");
		do_it(how, o);
		dprintf(1, "done %ld\n", step);
	}
}
