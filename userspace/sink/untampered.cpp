// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/untampered.h"

#include <algorithm>
#include <cerrno>
#include <string_view>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

namespace finrace {

namespace {

struct Opened {
    int fd = -1;
    int error = 0;           ///< errno, of fd -1
    std::string objection{}; ///< why it is not taken
    bool by_others = false;  ///< they may write to the folder
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
    // Asked before, for it says more than ELOOP and opens no pipe; and of what was opened, for it may be another by
    // then.
    if (opened.by_others && ::fstatat(folder, name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0)
        opened.objection = objection_to(there, in);
    if (!opened.objection.empty())
        return opened;
    opened.fd = ::openat(folder, name.c_str(), flags | O_CLOEXEC | (opened.by_others ? O_NOFOLLOW : 0), mode);
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
    std::string_view rest = path;
    int folder = ::open(path.starts_with('/') ? "/" : ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    for (bool last = false; folder >= 0 && !last;) {
        rest.remove_prefix(std::min(rest.find_first_not_of('/'), rest.size()));
        const std::string name(rest.substr(0, rest.find('/')));
        rest.remove_prefix(name.size());
        last = rest.empty();
        // What ends in / names a folder.
        const Opened opened = open_in(folder, name.empty() ? "." : name, last ? flags : O_PATH | O_DIRECTORY, mode);
        ::close(folder);
        folder = opened.fd;
        if (!opened.objection.empty()) {
            if (folder >= 0)
                ::close(folder);
            throw Tampered(
                fmt::format("{} is {}, in a folder that others may write to; remove it, or name a folder that "
                            "root and this user alone may write to",
                            path.substr(0, path.size() - rest.size()), opened.objection));
        }
        if (crossed != nullptr && opened.by_others)
            *crossed = true;
        errno = opened.error;
    }
    return folder;
}

} // namespace finrace
