// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What the targets that read files share: an input as a file, through `finrace run --replay`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "cli/options.h"

namespace finrace::test {

/// What a target itself found wrong.
[[noreturn]] inline void fail(const char* what)
{
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::abort();
}

/// Throws what the command throws.
inline void replay_input(const std::uint8_t* data, std::size_t size)
{
    static const int file = ::memfd_create("input", MFD_CLOEXEC);
    if (file < 0 || ::ftruncate(file, 0) != 0 || ::pwrite(file, data, size, 0) != static_cast<ssize_t>(size))
        fail("cannot write its file");
    CLI::App program("", "finrace");
    Action action;
    add_run(program, action);
    std::vector<std::string> arguments{"--connections",
                                       "--output",
                                       "/dev/null",
                                       "--interval",
                                       "1s",
                                       "--replay",
                                       fmt::format("/proc/self/fd/{}", file),
                                       "run"};
    std::reverse(arguments.begin(), arguments.end()); // as CLI11 wants them
    std::swap(arguments.front(), arguments.back());
    program.parse(std::move(arguments));
    action();
}

/// What the target's generator makes is not refused at the door: then nothing behind it would be tried.
inline void must_replay(const std::string& file)
{
    try {
        replay_input(reinterpret_cast<const std::uint8_t*>(file.data()), file.size());
    } catch (const std::exception& error) {
        fail(error.what());
    }
}

/// The mutator's answer: as much of `file` as there is room for.
inline std::size_t give(const std::string& file, std::uint8_t* data, std::size_t max_size)
{
    const std::size_t given = std::min(file.size(), max_size);
    std::memcpy(data, file.data(), given);
    return given;
}

} // namespace finrace::test
