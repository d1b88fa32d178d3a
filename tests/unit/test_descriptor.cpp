// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Files that end, that are not there, and that can't be read.
#include <catch2/catch.hpp>

#include <string>

#include <unistd.h>

#include "source/descriptor.h"
#include "source/host.h"

using namespace finrace;

TEST_CASE("a file is read whole, up to a limit, and one that can't be is empty", "[descriptor]")
{
    CHECK(read_whole("/proc/self/environ").find('=') != std::string::npos);
    CHECK(read_whole("/proc/self/maps").size() > 4096);
    CHECK(read_whole("/proc/self/maps", 5000).size() == 5000);
    CHECK(read_whole("/dev/zero").size() == 1U << 20U);
    CHECK(read_whole("/proc/self/mem").empty()); // read() fails, as it does in /proc where a process has just gone
    CHECK(read_whole("/proc/self").empty());
    CHECK(read_whole("/nowhere").empty());
    CHECK(process_comm(static_cast<std::uint32_t>(::getpid())) == "unit_tests");
    CHECK(process_comm(0).empty());
}
