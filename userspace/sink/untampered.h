// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Names in folders that others may write to, as /tmp or a user's own: whoever comes first has the name, and leads
// whoever opens it to another's file, or reads what is written. The kernel's fs.protected_* know of sticky folders
// alone, and may be off.
#pragma once

#include <cerrno>
#include <string>

#include <sys/types.h>

#include "sink/stream.h"

namespace finrace {

/// What is there is not root's, ours, or its folder's owner's.
struct Tampered : OutputError {
    explicit Tampered(const std::string& text) : OutputError(text, EACCES) {}
};

/// open(2) with O_CLOEXEC; -1 leaves the reason in errno. In each folder on the way that others may write to (mode o+w,
/// or its owner is neither root nor this process's user), also where links of elsewhere lead there, no link is
/// followed, and only what is root's, ours or the folder's owner's is opened, a file only if it has no other name:
/// link(2) takes others' files. Throws Tampered. `crossed`: set if there was such a folder.
int open_untampered(const std::string& path, int flags, mode_t mode = 0, bool* crossed = nullptr);

/// Whether both descriptors refer to one file, pipe or device.
bool is_same_file(int one, int other);

/// Whether `path` still leads to what is open as `descriptor`, by a way that open_untampered() goes. Throws Tampered.
bool leads_to(const std::string& path, int descriptor);

} // namespace finrace
