/* Counts the steps that a process, and those it forks, take on files below a folder; ends the process at one of them,
   fails that one and those after it, or does something beside it.

   Loaded by LD_PRELOAD; idle until `steps_arm` is called. A step is one call that changes what is on disk or asks for
   it to be there. Calls are seen whoever makes them: Python, Arrow, SQLite, safetensors. See commands.py. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, KILL, TEAR, FAIL, DO };
enum { GO_ON, STOP, HALF };

static struct {
    int armed, log, group, error;
    enum mode mode;
    long at;
    size_t length;
    const char *when; /* DO: beginning of "kind path" of the step; empty: it is number `at` */
    const char *what; /* FAIL: the kinds that fail, as " write create "; DO: what a shell is to do */
    char folder[PATH_MAX];
} plan;
static atomic_long *count; /* steps, and whether it was done; shared by all processes */

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void steps_arm(const char *folder, int log, int mode, long at, int group, int error, const char *when,
               const char *what) {
    count = mmap(NULL, 2 * sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(plan.folder, sizeof plan.folder, "%s/", folder);
    plan.length = strlen(plan.folder);
    plan.log = log, plan.mode = mode, plan.at = at, plan.group = group, plan.error = error;
    plan.when = strdup(when), plan.what = strdup(what);
    plan.armed = 1;
}

static void die(void) { kill(plan.group ? 0 : getpid(), SIGKILL); for (;;) pause(); }

static void tell(long number, const char *kind, const char *path) {
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path + plan.length);
    syscall(SYS_write, plan.log, line, (size_t)size);
}

static int is_the_one(long number, const char *kind, const char *path) {
    char step[PATH_MAX + 16];
    if (!plan.when[0]) return number == plan.at;
    snprintf(step, sizeof step, "%s %s", kind, path);
    return !strncmp(step, plan.when, strlen(plan.when)) && !atomic_fetch_add(count + 1, 1);
}

/* Not: making what is there, and removing what is not; the system says so first. */
static int needs_the_disk(const char *kind, const char *path) {
    int there = access(path, F_OK) == 0;
    if (!strcmp(kind, "remove")) return there;
    return !there || (strcmp(kind, "mkdir") && (strcmp(kind, "create") || plan.error == EROFS));
}

/* What is to become of a step: it goes on, fails, or is done by half and the process ended. */
static int take(const char *kind, const char *path) {
    char wanted[16];
    if (strncmp(path, plan.folder, plan.length)) return GO_ON;
    if (!strcmp(kind, "from")) return tell(0, kind, path), GO_ON; /* no step: where a renamed thing was before */
    long number = atomic_fetch_add(count, 1) + 1;
    tell(number, kind, path);
    if (plan.mode == KILL && number == plan.at) die();
    if (plan.mode == TEAR && number == plan.at) {
        if (!strcmp(kind, "write")) return HALF;
        die();
    }
    if (plan.mode == DO && is_the_one(number, kind, path + plan.length)) (void)!system(plan.what);
    snprintf(wanted, sizeof wanted, " %s ", kind);
    if (plan.mode == FAIL && number >= plan.at && strstr(plan.what, wanted) && needs_the_disk(kind, path)) {
        errno = plan.error;
        return STOP;
    }
    return GO_ON;
}

static int take_fd(const char *kind, int fd) {
    char link[64], path[PATH_MAX];
    if (!plan.armed || fd < 0) return GO_ON;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (size <= 0) return GO_ON;
    path[size] = 0;
    return take(kind, path);
}

static int take_path(const char *kind, int folder, const char *name) {
    char link[64], path[PATH_MAX * 2];
    if (!plan.armed || name == NULL) return GO_ON;
    if (name[0] == '/') return take(kind, name);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    int saved = errno;
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    errno = saved;
    if (size <= 0) return GO_ON;
    snprintf(path + size, PATH_MAX, "/%s", name);
    return take(kind, path);
}

static int take_open(int folder, const char *path, int flags) {
    return flags & (O_CREAT | O_TRUNC) && flags & O_ACCMODE ? take_path("create", folder, path) : GO_ON;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        return take_open(AT_FDCWD, path, flags) ? -1 : REAL(name)(path, flags, mode);                                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        return take_open(folder, path, flags) ? -1 : REAL(name)(folder, path, flags, mode);                            \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        return strpbrk(mode, "wa") && take_path("create", AT_FDCWD, path) ? NULL : REAL(name)(path, mode);             \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* A call that writes `size` bytes at most; done by half, it is the last thing the process does. */
#define WRITES(fd, size, whole, half)                                                                                  \
    switch (take_fd("write", fd)) {                                                                                    \
    case STOP: return -1;                                                                                              \
    case HALF: if ((size) > 1) (void)!(half); die();                                                                   \
    default: return whole;                                                                                             \
    }

ssize_t write(int fd, const void *data, size_t size) {
    WRITES(fd, size, REAL(write)(fd, data, size), REAL(write)(fd, data, size / 2))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WRITES(fd, size, REAL(pwrite)(fd, data, size, at), REAL(pwrite)(fd, data, size / 2, at))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    WRITES(fd, size, REAL(pwrite64)(fd, data, size, at), REAL(pwrite64)(fd, data, size / 2, at))
}
ssize_t writev(int fd, const struct iovec *pieces, int n) {
    WRITES(fd, 2, REAL(writev)(fd, pieces, n), REAL(write)(fd, pieces[0].iov_base, (pieces[0].iov_len + 1) / 2))
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    WRITES(out, size, REAL(sendfile)(out, in, at, size), REAL(sendfile)(out, in, at, size / 2))
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    WRITES(out, size, REAL(sendfile64)(out, in, at, size), REAL(sendfile64)(out, in, at, size / 2))
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    WRITES(out, size, REAL(copy_file_range)(in, from, out, to, size, flags),
           REAL(copy_file_range)(in, from, out, to, size / 2, flags))
}

#define SIMPLE(name, where, declared, given)                                                                           \
    int name declared { return where ? -1 : REAL(name) given; }
SIMPLE(ftruncate, take_fd("truncate", fd), (int fd, off_t size), (fd, size))
SIMPLE(ftruncate64, take_fd("truncate", fd), (int fd, off64_t size), (fd, size))
SIMPLE(fsync, take_fd("fsync", fd), (int fd), (fd))
SIMPLE(fdatasync, take_fd("fsync", fd), (int fd), (fd))
SIMPLE(rename, take_path("from", AT_FDCWD, old) || take_path("rename", AT_FDCWD, new),
       (const char *old, const char *new), (old, new))
SIMPLE(renameat, take_path("from", a, old) || take_path("rename", b, new),
       (int a, const char *old, int b, const char *new), (a, old, b, new))
SIMPLE(link, take_path("link", AT_FDCWD, new), (const char *old, const char *new), (old, new))
SIMPLE(symlink, take_path("link", AT_FDCWD, new), (const char *old, const char *new), (old, new))
SIMPLE(unlink, take_path("remove", AT_FDCWD, path), (const char *path), (path))
SIMPLE(unlinkat, take_path("remove", folder, path), (int folder, const char *path, int flags),
       (folder, path, flags))
SIMPLE(rmdir, take_path("remove", AT_FDCWD, path), (const char *path), (path))
SIMPLE(mkdir, take_path("mkdir", AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
SIMPLE(mkdirat, take_path("mkdir", folder, path), (int folder, const char *path, mode_t mode),
       (folder, path, mode))
