// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A configuration file: its keys are a command's flags, the command line wins, and what is wrong is named with its
// place.
#include "cli/config_file.h"

#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <catch2/catch.hpp>

#include "cli/options.h"

using namespace finrace;

namespace {

struct Taken {
    WatchOptions watch;
    std::string output = "-";
    std::uint64_t keep = 5;
    bool connections = false;
    ConfigFile config;
};

Taken taken(const std::string& text, std::vector<std::string> arguments = {})
{
    Taken all;
    CLI::App command("a command like run", "run");
    add_watch_options(command, all.watch);
    command.add_option("--output", all.output)->type_name("FILE");
    add_parsed(command, "--keep", "NUMBER", "", [&all](const std::string& number) { all.keep = std::stoull(number); });
    command.add_flag("--connections", all.connections);
    add_config_options(command, all.config);
    command.parse(std::move(arguments)); // CLI11 takes them from the end
    take_config_text(command, "f.toml", text);
    return all;
}

void refuses(const std::string& text, const std::string& said)
{
    CHECK_THROWS_WITH(taken(text), Catch::Equals(said));
}

} // namespace

TEST_CASE("a configuration file says what flags say", "[config]")
{
    const Taken all = taken("# what to watch\n"
                            "upstream = ['10.0.0.5:8000', \"10.0.0.0/8\"]\n"
                            "process = 'nginx'\n"
                            "side = 'client'\n"
                            "ring_bytes = 65536\n"
                            "output = '/var/log/f.jsonl'\n"
                            "keep = 7\n"
                            "connections = true\n");
    CHECK(all.watch.filter.upstreams.size() == 2);
    CHECK(all.watch.filter.processes.size() == 1);
    CHECK(all.watch.filter.flags == std::vector<std::string>{"--upstream 10.0.0.5:8000", "--upstream 10.0.0.0/8",
                                                             "--process nginx", "--side client"});
    CHECK(all.watch.live.ring_bytes == 65536);
    CHECK(all.output == "/var/log/f.jsonl");
    CHECK(all.keep == 7);
    CHECK(all.connections);
    CHECK(taken("").output == "-");
    CHECK(taken("upstream = []\n").watch.filter.upstreams.empty());
    CHECK(!taken("connections = false\n").connections);
}

TEST_CASE("the command line wins over the configuration file", "[config]")
{
    const Taken all = taken("upstream = ['10.0.0.5:8000', '10.0.0.6:8000']\noutput = '/there'\nconnections = false\n",
                            {"--connections", "here", "--output", ":80", "--upstream"});
    CHECK(all.watch.filter.upstreams.size() == 1);
    CHECK(all.output == "here");
    CHECK(all.connections);
}

TEST_CASE("what is wrong in a configuration file is named with its place", "[config]")
{
    refuses("\nupstrem = 'x'\n",
            "f.toml:2: upstrem is no key; accepted: upstream, process, side, idle_timeout, backend, attach, "
            "ring_bytes, max_connections, output, keep, connections");
    refuses("[run]\noutput = 'x'\n",
            "f.toml:1: run is no key; accepted: upstream, process, side, idle_timeout, backend, attach, "
            "ring_bytes, max_connections, output, keep, connections");
    for (const std::string key : {"help", "config", "check_config", "check-config"})
        CHECK_THROWS_WITH(taken(key + " = true"), Catch::StartsWith("f.toml:1: " + key + " is no key"));
    refuses("backend = 'ebpf'", "f.toml:1: backend: 'ebpf' is not known; accepted: auto, trace, cgroup");
    refuses("\n\nring_bytes = 7", "f.toml:3: ring_bytes: '7' is out of range; accepted: 4k to 1G");
    refuses(
        "upstream = ['10.0.0.1', 'x:y']",
        "f.toml:1: upstream: 'x:y' is no address pattern: connections have addresses, no names: see getent ahosts x; "
        "accepted: 10.0.0.5, 10.0.0.0/8, 10.0.0.5:8080, :8080, 2001:db8::5, 2001:db8::/32, [2001:db8::5]:8080, "
        "[2001:db8::/32]:8080");
    for (const char* value : {"true", "1.5", "[['10.0.0.1']]", "[1.5]", "1979-05-27", "{a = 1}"})
        refuses(std::string("upstream = ") + value,
                "f.toml:1: upstream takes no such value; accepted: \"ADDR[/LEN][:PORT]|:PORT\", or "
                "[\"ADDR[/LEN][:PORT]|:PORT\", ...]");
    for (const char* value : {"['a', 'b']", "['a']", "[]"})
        refuses(std::string("output = ") + value, "f.toml:1: output takes no such value; accepted: \"FILE\"");
    refuses("connections = []", "f.toml:1: connections takes no such value; accepted: true or false");
    refuses("connections = 'yes'", "f.toml:1: connections takes no such value; accepted: true or false");
    CHECK_THROWS_WITH(taken("output = 'a'\noutput = 'b'\n"), Catch::StartsWith("f.toml:2: "));
    CHECK_THROWS_WITH(taken("output = "), Catch::StartsWith("f.toml:1: "));
    CHECK_THROWS_WITH(taken("output = 'a\xff'"), Catch::StartsWith("f.toml:1: "));
    CHECK_THROWS_WITH(taken(std::string(300, '[')), Catch::StartsWith("f.toml:1: "));
}
