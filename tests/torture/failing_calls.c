/* The N-th system call of some kinds that names a file below a folder, or holds one open, fails in this process.

   A seccomp filter turns these calls into a signal, whoever makes them: Python, a library, the C library itself. The
   handler looks at the path, counts, and passes the call on from the one place that the filter lets through. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* Instead of an error: half of the bytes are written, as the caller is told; after that nothing fails, or all does. */
#define SHORT -1
#define FULL -2
#define NONE -1

/* Which argument is a descriptor, and which a path; a path that is not absolute starts at the descriptor. */
static const struct call {
    int number;
    const char *kind;
    int file, path;
} calls[] = {
    {__NR_open, " open ", NONE, 0},        {__NR_openat, " open ", 0, 1},
    {__NR_mkdir, " mkdir ", NONE, 0},      {__NR_mkdirat, " mkdir ", 0, 1},
    {__NR_read, " read ", 0, NONE},        {__NR_pread64, " read ", 0, NONE},
    {__NR_getdents64, " read ", 0, NONE},
    {__NR_write, " write ", 0, NONE},      {__NR_pwrite64, " write ", 0, NONE},
    {__NR_writev, " write ", 0, NONE},     {__NR_ftruncate, " truncate ", 0, NONE},
    {__NR_fsync, " sync ", 0, NONE},       {__NR_fdatasync, " sync ", 0, NONE},
    {__NR_rename, " rename ", NONE, 0},    {__NR_renameat, " rename ", 0, 1},
    {__NR_renameat2, " rename ", 0, 1},    {__NR_unlink, " remove ", NONE, 0},
    {__NR_unlinkat, " remove ", 0, 1},     {__NR_rmdir, " remove ", NONE, 0},
};
#define CALLS (sizeof calls / sizeof *calls)

static char below[PATH_MAX];
static int error;
static long due;
static struct {
    atomic_long count;
    char struck[16]; /* the kind of the call that failed */
} *shared;

extern const char passed_on[] __attribute__((visibility("hidden")));

__attribute__((noinline, noclone)) static long pass_on(long number, const long *argument)
{
    register long fourth asm("r10") = argument[3], fifth asm("r8") = argument[4], sixth asm("r9") = argument[5];
    long result;
    asm volatile("syscall\n.globl passed_on\n.hidden passed_on\npassed_on:"
                 : "=a"(result)
                 : "a"(number), "D"(argument[0]), "S"(argument[1]), "d"(argument[2]), "r"(fourth), "r"(fifth), "r"(sixth)
                 : "rcx", "r11", "memory");
    return result;
}

/* 0 where the call does not count, or is passed on; else what becomes of it. */
static int judge(const struct call *call, const long *argument)
{
    char path[2 * PATH_MAX] = "", link[64];
    const char *name = call->path == NONE ? NULL : (const char *)argument[call->path];
    if (call->file != NONE && (int)argument[call->file] != AT_FDCWD && (name == NULL || name[0] != '/')) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", (int)argument[call->file]);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        path[length < 0 ? 0 : length] = 0;
    }
    if (name != NULL)
        snprintf(path + strlen(path), PATH_MAX, "%s%s", path[0] ? "/" : "", name);
    if (strncmp(path, below, strlen(below)))
        return 0;
    long number = atomic_fetch_add(&shared->count, 1) + 1;
    if (number == due) {
        strncpy(shared->struck, call->kind, sizeof shared->struck - 1);
        return error == FULL ? SHORT : error;
    }
    return error == FULL && due && number > due ? ENOSPC : 0;
}

static void on_call(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long argument[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                        registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
    int before = errno, verdict = 0;
    for (size_t each = 0; each < CALLS; each++)
        if (calls[each].number == info->si_syscall)
            verdict = judge(&calls[each], argument);
    if (verdict == SHORT && argument[2] > 1)
        argument[2] /= 2;
    registers[REG_RAX] = verdict > 0 ? -verdict : pass_on(info->si_syscall, argument);
    errno = before;
}

/* Kinds are words between spaces; ``counter`` is a file of 24 bytes that is there. Returns 0, or -1 and errno. */
int arm_fault(const char *folder, const char *kinds, int number_of_error, long number, const char *counter)
{
    char words[64];
    int file = open(counter, O_RDWR | O_CLOEXEC);
    if (file < 0 || snprintf(below, sizeof below, "%s/", folder) >= (int)sizeof below
        || snprintf(words, sizeof words, " %s ", kinds) >= (int)sizeof words)
        return -1;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared == MAP_FAILED)
        return -1;
    error = number_of_error, due = number;

    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER};
    uintptr_t place = (uintptr_t)passed_on;
    struct sock_filter filter[8 + CALLS] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)place, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(place >> 32), 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    };
    unsigned short length = 6;
    int left = 0; /* comparisons to jump over, from here to the last return */
    for (size_t each = 0; each < CALLS; each++)
        left += strstr(words, calls[each].kind) != NULL;
    for (size_t each = 0; each < CALLS; each++)
        if (strstr(words, calls[each].kind))
            filter[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[each].number, left--, 0);
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {.len = length, .filter = filter};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -1;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
