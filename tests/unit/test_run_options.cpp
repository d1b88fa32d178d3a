// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a running finrace takes anew of its configuration, and what it leaves until a restart.
#include "cli/run_options.h"

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <catch2/catch.hpp>

#include "folder.h"

using namespace finrace;
using test::Folder;

namespace {

using Keys = std::vector<std::string>;

struct Running {
    explicit Running(const std::string& text) : path(folder.holding("f.toml", text))
    {
        add_run_options(command, options);
        reloader.emplace(command, path);
    }
    Reloader::Reloaded reload(const std::string& text, const std::string& backend = "trace", bool records = false)
    {
        path = folder.holding("f.toml", text);
        return reloader->read({.host_name = {}, .backend = backend, .attach = {}, .missing = {}}, records);
    }

    Folder folder;
    std::string path;
    RunOptions options;
    CLI::App command{"a command like run", "run"};
    std::optional<Reloader> reloader;
};

} // namespace

TEST_CASE("a reload takes what userspace alone decides", "[config]")
{
    Running running("interval = '10s'\nflat = true\n");
    const auto first =
        running.reload("interval = '50ms'\nside = 'server'\nfor = '1h'\nupstream = ':80'\nprocess = 'nginx'\n"
                       "upstream_name = ':80=web'\nconnections = true\nmask_addresses = 'all'\n");
    CHECK(first.taken == Keys{"flat", "for", "interval", "process", "side", "upstream", "upstream_name"});
    CHECK(first.left == Keys{"connections", "mask_addresses"});
    CHECK(first.options->interval == std::chrono::milliseconds(50));
    CHECK(first.options->duration == std::chrono::hours(1));
    CHECK(first.options->watch.filter.side == Side::server);
    CHECK(first.options->watch.filter.upstreams.size() == 1);
    CHECK_FALSE(first.options->flat);
    CHECK_FALSE(first.options->connections);
    CHECK_FALSE(first.options->addresses.disguises());

    const auto second = running.reload("flat = true\n");
    CHECK(second.options->flat);
    CHECK_FALSE(second.options->watch.filter.side);
    CHECK_FALSE(second.options->duration);
    CHECK(second.options->interval == RunOptions{}.interval);
}

TEST_CASE("a reload leaves a recording's filter as its header tells it", "[config]")
{
    Running running("side = 'client'\n");
    const auto reloaded = running.reload("upstream = ':80'\nprocess = 'nginx'\nflat = true\n", "trace", true);
    CHECK(reloaded.taken == Keys{"flat"});
    CHECK(reloaded.left == Keys{"process", "side", "upstream"});
    CHECK(reloaded.options->watch.filter.flags == Keys{"--side client"});
}

TEST_CASE("a reload for what servers do is refused where nothing tells of it, and all stays", "[config]")
{
    Running running("side = 'client'\n");
    CHECK_THROWS_WITH(
        running.reload("side = 'server'\nflat = true\n", "cgroup"),
        Catch::Contains("f.toml:1: side: --side server: backend cgroup, the one that works here, doesn't tell"));
    const auto next = running.reload("side = 'client'\nflat = true\n", "cgroup");
    CHECK(next.taken == Keys{"flat"});
    CHECK(next.options->watch.filter.side == Side::client);
}
