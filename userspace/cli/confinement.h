// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a long-lived process gives up once it has attached: the file system but for its outputs' folders, the
// capabilities, and the system calls that it never makes again. Whoever finds a way into it finds little there; and
// none but root gets in as its debugger would.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cli/command_line.h"
#include "sink/json.h"

namespace finrace {

/// What will still be needed once all else is given up.
struct Needed {
    std::vector<std::string> files{};    ///< to be opened anew, as absolute_path() tells them
    std::vector<std::string> sockets{};  ///< to be connected to: paths from the root on, or @ and an abstract name
    std::vector<std::string> read{};     ///< files to be read anew
    std::vector<std::string> listed{};   ///< folders, if they are there, of whose files the names are read
    bool serves = false;                 ///< whether it answers whoever connects to a socket that is open
    int will_listen = -1;                ///< a socket that is to listen yet
    std::function<void()> with_rights{}; ///< called with nothing but these in reach, and all capabilities still there
};

/// Gives all of it up, for good, but for what is `needed`. `counts`: whether the kernel's counters can be read with the
/// capabilities of that moment. Nothing of it fails: where the kernel or a container refuses a step, that is said, and
/// the others are taken all the same. The process must have one thread; what is mounted later is not seen by it.
Confinement confine(const Needed& needed, const std::function<bool()>& counts);

/// --unconfined.
void add_confinement_option(CLI::App& command, bool& unconfined);

/// A file's name from the root on, its folder's links followed; the name as it is if that can't be told.
std::string absolute_path(const std::string& path);

} // namespace finrace
