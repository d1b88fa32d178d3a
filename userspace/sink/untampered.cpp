// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/untampered.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <optional>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <fmt/format.h>

namespace finrace {

namespace {

constexpr int most_links = 40; ///< as the kernel has it: MAXSYMLINKS, linux/namei.h

struct Opened {
    int fd = -1;
    int error = 0;                         ///< errno, of fd -1
    std::string objection{};               ///< why it is not taken
    std::optional<std::string> leads_to{}; ///< instead: a symbolic link's, which those who may be trusted have made
    bool by_others = false;                ///< they may write to the folder
};

bool is_trusted(uid_t user)
{
    return user == 0 || user == ::geteuid();
}

std::string objection_to(const struct stat& there, const struct stat& folder)
{
    if (!is_trusted(there.st_uid) && there.st_uid != folder.st_uid)
        return fmt::format("user {}'s", there.st_uid);
    if (S_ISLNK(there.st_mode))
        return "a symbolic link";
    if (S_ISREG(there.st_mode) && there.st_nlink > 1)
        return "a file that has another name as well";
    return {};
}

/// What a link of proc's leads to, its name does not tell.
bool is_proc(int folder)
{
    struct statfs system {};
    return ::fstatfs(folder, &system) == 0 && system.f_type == PROC_SUPER_MAGIC;
}

/// One component further.
Opened open_in(int folder, const std::string& name, int flags, mode_t mode)
{
    Opened opened;
    struct stat in {};
    struct stat there {};
    if (::fstat(folder, &in) != 0)
        return {.error = errno};
    const bool group_is_others = in.st_gid != 0 && in.st_gid != ::getegid();
    opened.by_others =
        (in.st_mode & S_IWOTH) != 0 || ((in.st_mode & S_IWGRP) != 0 && group_is_others) || !is_trusted(in.st_uid);
    const bool follows = !opened.by_others && is_proc(folder);
    // Asked before, for it says more than ELOOP and opens no pipe; and of what was opened, for it may be another by
    // then.
    if (!follows && ::fstatat(folder, name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0) {
        if (opened.by_others)
            opened.objection = objection_to(there, in);
        if (!opened.objection.empty())
            return opened;
        if (S_ISLNK(there.st_mode)) {
            std::string target(PATH_MAX, '\0');
            const ::ssize_t length = ::readlinkat(folder, name.c_str(), target.data(), target.size());
            if (length < 0)
                return {.error = errno};
            target.resize(static_cast<std::size_t>(length));
            opened.leads_to = std::move(target);
            return opened;
        }
    }
    opened.fd = ::openat(folder, name.c_str(), flags | O_CLOEXEC | (follows ? 0 : O_NOFOLLOW), mode);
    opened.error = errno;
    if (opened.by_others && opened.fd >= 0 && ::fstat(opened.fd, &there) == 0)
        opened.objection = objection_to(there, in);
    return opened;
}

} // namespace

int open_untampered(const std::string& path, int flags, mode_t mode, bool* crossed)
{
    if (path.empty()) {
        errno = ENOENT;
        return -1;
    }
    const auto begin = [](const std::string& from) {
        return ::open(from.starts_with('/') ? "/" : ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    };
    std::string rest = path;
    std::string so_far = path.starts_with('/') ? "/" : "";
    int links = 0;
    int folder = begin(path);
    for (bool last = false; folder >= 0 && !last;) {
        rest.erase(0, std::min(rest.find_first_not_of('/'), rest.size()));
        const std::string name = rest.substr(0, rest.find('/'));
        rest.erase(0, name.size());
        last = rest.empty();
        // What ends in / names a folder.
        const Opened opened = open_in(folder, name.empty() ? "." : name, last ? flags : O_PATH | O_DIRECTORY, mode);
        if (crossed != nullptr && opened.by_others)
            *crossed = true;
        if (opened.leads_to && !opened.leads_to->empty() && ++links <= most_links) {
            rest.insert(0, *opened.leads_to);
            last = false;
            if (rest.starts_with('/')) {
                ::close(folder);
                folder = begin(rest);
                so_far = "/";
            }
            continue;
        }
        ::close(folder);
        folder = opened.fd;
        so_far += (so_far.empty() || so_far.ends_with('/') ? "" : "/") + name;
        if (!opened.objection.empty()) {
            if (folder >= 0)
                ::close(folder);
            throw Tampered(
                fmt::format("{} is {}, in a folder that others may write to; remove it, or name a folder that "
                            "root and this user alone may write to",
                            so_far, opened.objection));
        }
        errno = opened.leads_to ? ELOOP : opened.error;
    }
    return folder;
}

bool is_same_file(int one, int other)
{
    struct stat a {};
    struct stat b {};
    return ::fstat(one, &a) == 0 && ::fstat(other, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

bool leads_to(const std::string& path, int descriptor)
{
    const int fd = open_untampered(path, O_PATH);
    const bool leads = fd >= 0 && is_same_file(fd, descriptor);
    if (fd >= 0)
        ::close(fd);
    return leads;
}

} // namespace finrace
