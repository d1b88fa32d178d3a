// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/confinement.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>

#include <cap-ng.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/landlock.h>
#include <linux/perf_event.h>
#include <netinet/in.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "cli/options.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

namespace fs = std::filesystem;

constexpr unsigned long harmless = MS_NOSUID | MS_NODEV | MS_NOEXEC;
/// Covered by the new root, which has to be mounted somewhere: there is one on every system (FHS 3.0, 3.18).
constexpr const char* covered = "/tmp";

/// What was refused, as an errno tells it.
struct Refused {
    const char* step;
    int error;
};

void require(bool done, const char* step)
{
    if (!done)
        throw Refused{step, errno};
}

/// Where names lead that are to be opened again: their folders, and those of what links there point to. Throws Refused.
std::set<fs::path> folders_of(const std::vector<std::string>& files)
{
    constexpr int most_links = 40; // MAXSYMLINKS, include/linux/namei.h
    std::set<fs::path> folders;
    for (const std::string& file : files) {
        fs::path name = file;
        std::error_code ended;
        for (int links = 0; links <= most_links && !ended; ++links) {
            if (name.is_relative())
                throw Refused{"what it needs has no absolute name", ENOENT};
            if (name.parent_path() == "/")
                throw Refused{"what it needs lies in / itself", EBUSY};
            folders.insert(name.parent_path());
            if (const fs::path target = fs::read_symlink(name, ended); !ended)
                name = absolute_path(name.parent_path() / target);
        }
    }
    return folders;
}

struct stat status_of(const std::string& path)
{
    struct stat status {};
    require(::stat(path.c_str(), &status) == 0, "stat(what it needs)");
    return status;
}

/// Of all processes the numbers and the names, and of the kernel's settings none: Linux 5.8. Elsewhere, and where a
/// container has covered parts of its /proc and so may mount none, that /proc, not to be written to.
void mount_processes(const std::string& at)
{
    if (::mount("proc", at.c_str(), "proc", harmless | MS_RDONLY, "subset=pid") == 0)
        return;
    require(::mount("/proc", at.c_str(), nullptr, MS_BIND, nullptr) == 0, "mount(/proc)");
    require(::mount(nullptr, at.c_str(), nullptr, MS_BIND | MS_REMOUNT | MS_RDONLY | harmless, nullptr) == 0,
            "mount(/proc, read-only)");
}

void bind_mount(const Descriptor& what, const std::string& at, unsigned long flags)
{
    const std::string source = fmt::format("/proc/self/fd/{}", what.get());
    require(::mount(source.c_str(), at.c_str(), nullptr, MS_BIND, nullptr) == 0, "mount(what it needs)");
    require(::mount(nullptr, at.c_str(), nullptr, MS_BIND | MS_REMOUNT | harmless | flags, nullptr) == 0,
            "mount(what it needs, nodev)");
}

/// A file that is a mount of its own (a container's configuration) is not in its folder, seen from below.
void mount_file_of_its_own(const std::string& name, const Descriptor& file)
{
    const std::string at = covered + name;
    struct stat there {};
    struct stat wanted {};
    if (::lstat(at.c_str(), &there) != 0 || !S_ISREG(there.st_mode) || ::fstat(file.get(), &wanted) != 0 ||
        (there.st_dev == wanted.st_dev && there.st_ino == wanted.st_ino))
        return;
    bind_mount(file, at, MS_RDONLY);
}

void build_root(const std::set<fs::path>& folders, const std::vector<Descriptor>& opened,
                const std::set<fs::path>& writable, const std::vector<std::string>& read,
                const std::vector<Descriptor>& opened_to_read)
{
    // Sorted, an outer folder comes before one in it, which is then there: nothing is made in what is not ours.
    auto folder = opened.begin();
    for (auto path = folders.begin(); path != folders.end(); ++path) {
        const std::string at = covered + path->string();
        const bool within = std::any_of(folders.begin(), path, [&](const fs::path& outer) {
            return path->string().starts_with(outer.string() + "/");
        });
        std::error_code error;
        if (!within)
            fs::create_directories(at, error);
        struct statvfs flags {};
        const bool is_read_only = ::fstatvfs(folder->get(), &flags) == 0 && (flags.f_flag & ST_RDONLY) != 0;
        bind_mount(*folder++, at, is_read_only || !writable.contains(*path) ? MS_RDONLY : 0);
    }
    for (std::size_t i = 0; i < read.size(); ++i)
        mount_file_of_its_own(read[i], opened_to_read[i]);
    const std::string processes = std::string(covered) + "/proc";
    require(::mkdir(processes.c_str(), 0555) == 0 || errno == EEXIST, "mkdir(proc)");
    mount_processes(processes);
    require(::chdir(covered) == 0, "chdir()");
    // Both are mounted at the same place then, the old one above: pivot_root(2), "pivot_root(".", ".")".
    if (::syscall(SYS_pivot_root, ".", ".") == 0) {
        require(::umount2(".", MNT_DETACH) == 0, "umount(the old root)");
    } else {
        // Docker's and containerd's filters let nobody do that. Moved over the old root, it covers that as well: nobody
        // comes out from below without CAP_SYS_CHROOT, which goes with the others.
        const Refused refused{"pivot_root()", errno};
        const bool may = ::chroot("/") == 0; // asked first: it can't be undone
        if (!may || ::mount(".", "/", nullptr, MS_MOVE, nullptr) != 0 || ::chroot(".") != 0)
            throw refused;
    }
    require(::chdir("/") == 0, "chdir()");
    require(::mount(nullptr, "/", nullptr, MS_BIND | MS_REMOUNT | MS_RDONLY | harmless, nullptr) == 0,
            "mount(/, read-only)");
}

/// A root of its own in a mount namespace of its own. Throws Refused, and then all is as before.
void leave_files(const Needed& needed, std::set<fs::path> folders)
{
    const std::set<fs::path> writable = folders_of(needed.files);
    folders.insert(writable.begin(), writable.end());
    std::vector<std::string> files = needed.files;
    files.insert(files.end(), needed.read.begin(), needed.read.end());
    std::vector<struct stat> before;
    std::transform(files.begin(), files.end(), std::back_inserter(before), status_of);
    const Descriptor back(::open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC));
    const Descriptor here(::open(".", O_PATH | O_DIRECTORY | O_CLOEXEC));
    require(back && here && ::unshare(CLONE_NEWNS) == 0, "unshare(CLONE_NEWNS)");
    const Descriptor here_now(::open(".", O_PATH | O_DIRECTORY | O_CLOEXEC)); // the same, in the new namespace
    bool is_covered = false;
    try {
        // Slaves, so that what is unmounted elsewhere is not kept here.
        require(::mount(nullptr, "/", nullptr, MS_REC | MS_SLAVE, nullptr) == 0, "mount(/, slave)");
        std::vector<Descriptor> opened; // before one of them is covered
        for (const fs::path& path : folders) {
            opened.emplace_back(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
            require(static_cast<bool>(opened.back()), "open(a folder)");
        }
        std::vector<Descriptor> opened_to_read;
        for (const std::string& name : needed.read)
            opened_to_read.emplace_back(::open(name.c_str(), O_PATH | O_CLOEXEC));
        require(::mount("finrace", covered, "tmpfs", harmless, "mode=0755,size=1m") == 0, "mount(tmpfs)");
        is_covered = true;
        build_root(folders, opened, writable, needed.read, opened_to_read);
        for (std::size_t i = 0; i < files.size(); ++i) {
            const struct stat now = status_of(files[i]);
            if (now.st_dev != before[i].st_dev || now.st_ino != before[i].st_ino)
                throw Refused{"what it needs is not found again", ENOENT};
        }
    } catch (const Refused&) {
        const bool is_back = ::setns(back.get(), CLONE_NEWNS) == 0; // takes CAP_SYS_CHROOT
        if (!is_back && is_covered)
            ::umount2(covered, MNT_DETACH);
        [[maybe_unused]] const int there = ::fchdir(is_back ? here.get() : here_now.get());
        throw;
    }
}

/// What the folders that are left allow, as files: so a link of /proc/PID to another process's files leads nowhere, nor
/// does any other of ptrace(2)'s ways into it. Linux 5.13 (Landlock), where the kernel has been told to have it.
void leave_other_processes(const std::set<fs::path>& written, const std::set<fs::path>& read,
                           const std::set<fs::path>& listed)
{
    constexpr std::uint64_t all = (LANDLOCK_ACCESS_FS_MAKE_SYM << 1U) - 1; // of its first version
    constexpr std::uint64_t reading = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
    constexpr std::uint64_t writing =
        reading | LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_REMOVE_FILE;
    const landlock_ruleset_attr handled{.handled_access_fs = all};
    const Descriptor rules(
        static_cast<int>(::syscall(SYS_landlock_create_ruleset, &handled, sizeof(handled.handled_access_fs), 0)));
    if (!rules && (errno == ENOSYS || errno == EOPNOTSUPP))
        return;
    require(static_cast<bool>(rules), "landlock_create_ruleset()");
    const auto allow = [&](const fs::path& folder, std::uint64_t access) {
        const Descriptor opened(::open(folder.c_str(), O_PATH | O_CLOEXEC));
        const landlock_path_beneath_attr rule{.allowed_access = access, .parent_fd = opened.get()};
        require(opened && ::syscall(SYS_landlock_add_rule, rules.get(), LANDLOCK_RULE_PATH_BENEATH, &rule, 0) == 0,
                "landlock_add_rule()");
    };
    allow("/proc", reading);
    for (const fs::path& folder : listed)
        allow(folder, LANDLOCK_ACCESS_FS_READ_DIR);
    for (const fs::path& folder : read)
        allow(folder, reading);
    for (const fs::path& folder : written)
        allow(folder, writing);
    require(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "prctl(PR_SET_NO_NEW_PRIVS)");
    require(::syscall(SYS_landlock_restrict_self, rules.get(), 0) == 0, "landlock_restrict_self()");
}

/// CAP_BPF where the kernel lets nobody else use bpf() (kernel.unprivileged_bpf_disabled, before 5.19), for the
/// counters; CAP_DAC_OVERRIDE where files are opened anew, which whoever rotates them may have made another user's, and
/// where sockets are, which are their server's.
/// Throws Refused.
void leave_capabilities(bool reopens, const std::function<bool()>& counts)
{
    require(capng_get_caps_process() == 0, "capget()");
    const bool may_override = capng_have_capability(CAPNG_PERMITTED, CAP_DAC_OVERRIDE) != 0;
    const bool may_all = capng_have_capability(CAPNG_PERMITTED, CAP_SYS_ADMIN) != 0;
    const bool may_bpf = capng_have_capability(CAPNG_PERMITTED, CAP_BPF) != 0;
    const bool may_drop_bounds = capng_have_capability(CAPNG_EFFECTIVE, CAP_SETPCAP) != 0;
    ::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (may_drop_bounds) {
        capng_clear(CAPNG_SELECT_BOUNDS);
        require(capng_apply(CAPNG_SELECT_BOUNDS) == 0, "prctl(PR_CAPBSET_DROP)");
    }
    // First out of effect alone, to see what goes without.
    for (const unsigned capability : {CAP_BPF, CAP_SYS_ADMIN})
        capng_update(CAPNG_DROP, CAPNG_EFFECTIVE, capability);
    require(capng_apply(CAPNG_SELECT_CAPS) == 0, "capset()");
    const bool needs_more = !counts();
    constexpr auto both = static_cast<capng_type_t>(CAPNG_EFFECTIVE | CAPNG_PERMITTED);
    capng_clear(CAPNG_SELECT_CAPS);
    if (needs_more && (may_bpf || may_all))
        capng_update(CAPNG_ADD, both, may_bpf ? CAP_BPF : CAP_SYS_ADMIN);
    if (needs_more && !may_bpf && may_all)
        say("warning: CAP_SYS_ADMIN is kept, to read the counters: before Linux 5.19 that takes a capability; give it "
            "CAP_BPF as well, and it keeps that alone");
    if (reopens && may_override)
        capng_update(CAPNG_ADD, both, CAP_DAC_OVERRIDE);
    require(capng_apply(CAPNG_SELECT_CAPS) == 0, "capset()");
    require(counts(), "bpf(BPF_MAP_LOOKUP_ELEM): losses are not counted any more");
}

std::vector<std::string> permitted_capabilities()
{
    std::vector<std::string> names;
    if (capng_get_caps_process() != 0)
        return names;
    for (int capability = 0; capability <= CAP_LAST_CAP; ++capability) {
        if (capng_have_capability(CAPNG_PERMITTED, static_cast<unsigned>(capability)) == 0)
            continue;
        std::string name = "CAP_";
        for (const char c : std::string_view(capng_capability_to_name(static_cast<unsigned>(capability))))
            name += static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
        names.push_back(std::move(name));
    }
    return names;
}

std::set<fs::path> folders_that_are_there(const std::vector<std::string>& names)
{
    std::set<fs::path> folders;
    std::error_code unknown;
    for (const std::string& name : names)
        if (fs::path folder = fs::canonical(name, unknown); !unknown && fs::is_directory(folder, unknown))
            folders.insert(std::move(folder));
    return folders;
}

/// What lies in a folder, and is not written to: what is read, and the sockets that have a path.
std::vector<std::string> not_written_in(const Needed& needed)
{
    std::vector<std::string> names = needed.read;
    std::copy_if(needed.sockets.begin(), needed.sockets.end(), std::back_inserter(names),
                 [](const std::string& name) { return name.starts_with('/'); });
    return names;
}

/// What reading the ring, judging, writing and rotating files take; and what the C library does for it, on the way to
/// abort() too.
constexpr const char* needed_calls[] = {
    "read", "write", "writev", "pread64", "pwrite64", "lseek", "close", "dup", "dup3", "flock", "fsync", "fdatasync",
    "ftruncate", "fchmod",
    // names: below the outputs' folders
    "open", "openat", "stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink",
    "readlinkat", "fstatfs", "getcwd", "getdents64", "rename", "renameat", "renameat2", "unlink", "unlinkat",
    // waiting
    "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll", "select", "pselect6",
    "eventfd2", "timerfd_settime", "nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday",
    "restart_syscall", "sched_yield", "futex",
    // sockets that are open
    "getsockopt", "getsockname",
    // memory, without any that could be run
    "brk", "munmap", "mremap", "madvise",
    // itself
    "getpid", "gettid", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "signalfd4", "getrandom",
    "uname", "sysinfo", "getrusage", "exit", "exit_group", "getuid", "geteuid", "getgid", "getegid", "capget", "rseq",
    "set_robust_list"};

using SystemCallFilter = std::unique_ptr<void, decltype(&seccomp_release)>;

/// EPERM for everything else. Throws Refused.
void leave_system_calls(bool connects, bool serves, int will_listen)
{
    const SystemCallFilter filter(seccomp_init(SCMP_ACT_ERRNO(EPERM)), &seccomp_release);
    require(filter != nullptr, "seccomp_init()");
    const auto allow = [&](const char* name, std::optional<scmp_arg_cmp> where = std::nullopt) {
        const int call = seccomp_syscall_resolve_name(name);
        if (call == __NR_SCMP_ERROR)
            return; // one that this library does not know, the kernel's headers of its time did not have
        const scmp_arg_cmp condition = where.value_or(scmp_arg_cmp{});
        const int error = seccomp_rule_add_array(filter.get(), SCMP_ACT_ALLOW, call, where ? 1 : 0, &condition);
        errno = -error;
        require(error == 0, name);
    };
    const auto refuse = [&](const char* name, int with) {
        const int call = seccomp_syscall_resolve_name(name);
        if (call != __NR_SCMP_ERROR)
            require(seccomp_rule_add_array(filter.get(), SCMP_ACT_ERRNO(static_cast<unsigned>(with)), call, 0,
                                           nullptr) == 0,
                    name);
    };
    for (const char* name : needed_calls)
        allow(name);
    const auto equals = [](unsigned argument, scmp_datum_t value) {
        return scmp_arg_cmp{.arg = argument, .op = SCMP_CMP_EQ, .datum_a = value, .datum_b = 0};
    };
    // Root needs no capability to signal root's processes, to take their limits, or to have a file's owner signalled.
    for (const scmp_datum_t command : {F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC})
        allow("fcntl", equals(1, command));
    allow("tgkill", equals(0, static_cast<scmp_datum_t>(::getpid())));
    allow("sendto", equals(4, 0)); // to whom the socket is connected, and to nobody else
    if (connects) {
        allow("socket", equals(0, AF_UNIX));
        allow("connect");
    }
    if (serves) {
        for (const char* name : {"accept4", "recvfrom", "shutdown"})
            allow(name);
        allow("setsockopt", equals(1, IPPROTO_TCP));
        // With MSG_FASTOPEN it would open connections.
        allow("sendmsg", scmp_arg_cmp{.arg = 2, .op = SCMP_CMP_MASKED_EQ, .datum_a = MSG_FASTOPEN, .datum_b = 0});
    }
    if (will_listen >= 0)
        for (const char* name : {"bind", "listen"})
            allow(name, equals(0, static_cast<scmp_datum_t>(will_listen)));
    // A thread, as pthread_create() begins one, and no process: glibc falls back to clone() from clone3(), whose
    // arguments no filter sees.
    allow("clone", equals(0, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND | CLONE_THREAD |
                                 CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID));
    refuse("clone3", ENOSYS);
    for (const char* name : {"mmap", "mprotect"})
        allow(name, scmp_arg_cmp{.arg = 2, .op = SCMP_CMP_MASKED_EQ, .datum_a = PROT_EXEC, .datum_b = 0});
    for (const scmp_datum_t command : {BPF_MAP_LOOKUP_ELEM, BPF_OBJ_GET_INFO_BY_FD})
        allow("bpf", equals(0, command));
    allow("ioctl", equals(1, PERF_EVENT_IOC_DISABLE)); // at the end: libbpf, of a kprobe
    const int error = seccomp_load(filter.get());      // sets no_new_privs first
    errno = -error;
    require(error == 0, "seccomp()");
}

} // namespace

Confinement confine(const Needed& needed, const std::function<bool()>& counts)
{
    Confinement confinement;
    // Records and the key of pseudonyms: no core keeps them, and no process of the same user reads them.
    ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    const auto attempt = [](const std::string& otherwise, const auto& leave) {
        try {
            leave();
            return true;
        } catch (const Refused& refused) {
            say(fmt::format("warning: {}: {}: {}", otherwise, refused.step, std::strerror(refused.error)));
            return false;
        }
    };
    confinement.files = attempt("files that it does not need stay in its reach", [&] {
        const std::set<fs::path> listed = folders_that_are_there(needed.listed);
        std::set<fs::path> not_written = folders_of(not_written_in(needed));
        not_written.insert(listed.begin(), listed.end());
        leave_files(needed, std::move(not_written));
    });
    // Also where the old root stays: what Landlock lets it open there are the same folders.
    const bool apart = attempt("other processes' files stay in its reach", [&] {
        leave_other_processes(folders_of(needed.files), folders_of(needed.read), folders_that_are_there(needed.listed));
    });
    confinement.files = confinement.files && apart;
    if (needed.with_rights)
        needed.with_rights();
    const bool opens = !needed.files.empty() || !needed.sockets.empty();
    attempt("capabilities are kept that it does not need", [&] { leave_capabilities(opens, counts); });
    confinement.capabilities = permitted_capabilities();
    confinement.system_calls = attempt("all system calls stay in its reach", [&] {
        leave_system_calls(!needed.sockets.empty(), needed.serves, needed.will_listen);
    });
    return confinement;
}

void add_confinement_option(CLI::App& command, bool& unconfined)
{
    command.add_flag("--unconfined", unconfined,
                     "keep the capabilities, system calls and files that are not needed once it has attached");
}

std::string absolute_path(const std::string& path)
{
    std::error_code unknown;
    const fs::path whole = fs::absolute(path, unknown);
    if (unknown)
        return path;
    const fs::path folder = fs::canonical(whole.parent_path(), unknown);
    return unknown ? path : (folder / whole.filename()).string();
}

} // namespace finrace
