// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include <catch2/catch.hpp>

#include "folder.h"
#include "source/container.h"

using namespace finrace;
using finrace::test::Folder;

TEST_CASE("a container's own control group is not taken for the hierarchy's root")
{
    const Folder folder;
    CHECK_FALSE(is_cgroup_root(folder.path)); // nothing is mounted there
    [[maybe_unused]] const std::string controllers = folder.holding("cgroup.controllers", "memory\n");
    CHECK(is_cgroup_root(folder.path));
    [[maybe_unused]] const std::string type = folder.holding("cgroup.type", "domain\n");
    CHECK_FALSE(is_cgroup_root(folder.path));
}
