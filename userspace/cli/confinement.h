// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a long-lived process gives up once it has attached: the file system but for its outputs' folders, the
// capabilities, and the system calls that it never makes again. Whoever finds a way into it finds little there.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "sink/json.h"

namespace finrace {

/// Gives all of it up, for good. `outputs`: the files, as absolute_path() tells them, that will be opened anew; - is
/// standard output, and is not. `counts`: whether the kernel's counters can be read with the capabilities of that
/// moment. Nothing of it fails: where the kernel or a container refuses a step, that is said, and the others are taken
/// all the same. The process must have one thread; what is mounted later is not seen by it.
Confinement confine(std::vector<std::string> outputs, const std::function<bool()>& counts);

/// --unconfined.
void add_confinement_option(CLI::App& command, bool& unconfined);

/// A file's name from the root on, its folder's links followed; the name as it is if that can't be told.
std::string absolute_path(const std::string& path);

} // namespace finrace
