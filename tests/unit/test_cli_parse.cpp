// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What people type: the accepted forms, what lies just outside them, and the filter made of it.
#include <cstring>
#include <utility>
#include <vector>

#include <arpa/inet.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "cli/filter.h"
#include "cli/idle_timers.h"
#include "cli/parse.h"
#include "cli/privileges.h"
#include "source/container.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;
using namespace std::chrono_literals;

namespace {

bool matches(const char* pattern, const char* address, std::uint16_t port)
{
    std::array<std::uint8_t, 16> bytes{};
    const bool v6 = std::strchr(address, ':') != nullptr;
    REQUIRE(::inet_pton(v6 ? AF_INET6 : AF_INET, address, bytes.data()) == 1);
    return parse_address_pattern(pattern).matches(bytes.data(), v6 ? 6 : 4, port);
}

} // namespace

TEST_CASE("durations take a unit")
{
    CHECK(parse_duration("250ms") == 250ms);
    CHECK(parse_duration("10s") == 10s);
    CHECK(parse_duration("1.5s") == 1500ms);
    CHECK(parse_duration("2m") == 2min);
    CHECK(parse_duration("1h") == 1h);
    CHECK(parse_duration("1h30m") == 90min);
    CHECK(parse_duration("7us") == 7us);
    CHECK(parse_duration("0s") == 0s);
    CHECK_THROWS_WITH(parse_duration("10"), Catch::Contains("'10' has no unit") && Catch::Contains("250ms, 10s"));
    CHECK_THROWS_WITH(parse_duration("10x"), Catch::Contains("unknown unit 'x'"));
    CHECK_THROWS_WITH(parse_duration("1h30"), Catch::Contains("'1h30' has no unit"));
    for (const char* text : {"", "s", "-1s", "1..5s", "1e3s", "ten", " 1s", "1s ", "9999999h", "."}) {
        CAPTURE(text);
        CHECK_THROWS_AS(parse_duration(text), UsageError);
    }
}

TEST_CASE("sizes take powers of 1024")
{
    CHECK(parse_size("65536") == 65536);
    CHECK(parse_size("64k") == 65536);
    CHECK(parse_size("4M") == 4U << 20U);
    CHECK(parse_size("1G") == 1U << 30U);
    for (const char* text : {"", "k", "4MB", "-4k", "1.5M", "4 M", "18446744073709551616", "18014398509481984k"}) {
        CAPTURE(text);
        CHECK_THROWS_AS(parse_size(text), UsageError);
    }
}

TEST_CASE("address patterns match what lies in them, and nothing beside")
{
    CHECK(matches("10.0.0.5", "10.0.0.5", 1));
    CHECK_FALSE(matches("10.0.0.5", "10.0.0.6", 1));
    CHECK(matches("10.0.0.5:8080", "10.0.0.5", 8080));
    CHECK_FALSE(matches("10.0.0.5:8080", "10.0.0.5", 8081));
    CHECK(matches("10.0.0.77/25", "10.0.0.127", 1));
    CHECK_FALSE(matches("10.0.0.77/25", "10.0.0.128", 1));
    CHECK(matches("0.0.0.0/0", "255.1.2.3", 1));
    CHECK_FALSE(matches("0.0.0.0/0", "::1", 1));
    CHECK(matches("10.0.0.0/8:80", "10.9.9.9", 80));
    CHECK(matches("2001:db8::5", "2001:db8::5", 1));
    CHECK(matches("2001:db8::/33", "2001:db8:7fff::1", 1));
    CHECK_FALSE(matches("2001:db8::/33", "2001:db8:8000::1", 1));
    CHECK(matches("[2001:db8::5]:443", "2001:db8::5", 443));
    CHECK_FALSE(matches("[2001:db8::5]:443", "2001:db8::5", 80));
    CHECK(matches("[2001:db8::/32]:443", "2001:db8:1::5", 443));
    CHECK(matches("[::1]", "::1", 9));
    CHECK(matches("::ffff:10.0.0.5", "10.0.0.5", 1)); // events carry mapped addresses as IPv4
    CHECK(matches("::ffff:10.0.0.0/104", "10.200.0.5", 1));
    CHECK_FALSE(matches("::/0", "10.0.0.5", 1));
    for (const char* address : {"10.0.0.5", "2001:db8::5"}) {
        CHECK(matches(":9103", address, 9103));
        CHECK_FALSE(matches(":9103", address, 9104));
    }
    for (const char* text :
         {"", "localhost", "10.0.0", "10.0.0.5/33", "10.0.0.5/", "10.0.0.5/x", "10.0.0.5:", "10.0.0.5:0",
          "10.0.0.5:65536", "10.0.0.5:http", "[::1", "[::1]x", "[::1]80", "::1/129", "[]:80", ":", ":0", ":http"}) {
        CAPTURE(text);
        CHECK_THROWS_WITH(parse_address_pattern(text), Catch::Contains("accepted: "));
    }
}

TEST_CASE("what people write instead of an address is told apart, with what to write")
{
    const std::vector<std::pair<const char*, const char*>> texts{
        {"9103", "write :9103;"},
        {"http://10.0.0.5:8000/", "it is a URL; write 10.0.0.5:8000;"},
        {"https://user:word@[2001:db8::5]:8443?x=y@z", "it is a URL; write [2001:db8::5]:8443;"},
        {"app.example:8000", "getent ahosts app.example;"},
        {"localhost", "getent ahosts localhost;"},
        {"https://localhost:8443/", "ahosts localhost;"},
        {"http://", "'' is neither"},
        {"10.0.0", "'10.0.0' is neither"},
        {"a b", "'a b' is neither"},
        {"", "'' is neither"},
    };
    for (const auto& [text, hint] : texts) {
        CAPTURE(text);
        CHECK_THROWS_WITH(parse_address_pattern(text), Catch::Contains(hint) && Catch::Contains("accepted: "));
    }
}

TEST_CASE("idle timers by upstream: the first that matches")
{
    IdleTimers timers;
    timers.add("10.0.0.5:8000=5s");
    timers.add("10.0.0.0/8=75s");
    timers.add(":9000=250ms");
    const auto of = [&](std::uint8_t last, std::uint16_t port, std::uint8_t first = 10) {
        UpstreamKey key;
        key.address = {first, 0, 0, last};
        key.port = port;
        return timers.of(key);
    };
    CHECK(of(5, 8000) == 5'000);
    CHECK(of(5, 8001) == 75'000);
    CHECK(of(5, 9000, 192) == 250);
    CHECK_FALSE(of(5, 8000, 192));
    for (const char* wrong :
         {"", "10.0.0.5:8000", "5s", "10.0.0.5=", "10.0.0.5=5", "10.0.0.5=99ms", "10.0.0.5=25h", "host=5s"})
        CHECK_THROWS_AS(timers.add(wrong), UsageError);
}

TEST_CASE("processes by id or by name")
{
    CHECK(parse_process_pattern("1234").pid == 1234U);
    CHECK(parse_process_pattern("nginx").name == "nginx");
    CHECK(parse_process_pattern("3proxy").name == "3proxy");
    CHECK_THROWS_AS(parse_process_pattern(""), UsageError);
    CHECK_THROWS_AS(parse_process_pattern("0"), UsageError);
    CHECK_THROWS_AS(parse_process_pattern("99999999999"), UsageError);
    CHECK(parse_process_pattern("fifteen-bytes-x").name == "fifteen-bytes-x");
    CHECK_THROWS_WITH(parse_process_pattern("sixteen-bytes-xx"), Catch::Contains("'sixteen-bytes-x'"));
}

namespace {

const NotedProcessNames no_names;

} // namespace

TEST_CASE("the filter: any upstream and any process of those named")
{
    const event e = crossing();
    CHECK(Filter{}.matches(e, no_names));
    CHECK(Filter{.upstreams = {parse_address_pattern("10.9.9.9"), parse_address_pattern("10.0.0.2:8000")},
                 .processes = {}}
              .matches(e, no_names));
    CHECK_FALSE(Filter{.upstreams = {parse_address_pattern("10.0.0.1")}, .processes = {}}.matches(e, no_names));
    CHECK(Filter{.upstreams = {}, .processes = {parse_process_pattern("nginx")}}.matches(e, no_names));
    CHECK(
        Filter{.upstreams = {}, .processes = {parse_process_pattern("haproxy"), parse_process_pattern("1234")}}.matches(
            e, no_names));
    CHECK_FALSE(Filter{.upstreams = {}, .processes = {parse_process_pattern("ngin")}}.matches(e, no_names));
    CHECK_FALSE(
        Filter{.upstreams = {parse_address_pattern("10.0.0.2")}, .processes = {parse_process_pattern("1")}}.matches(
            e, no_names));
}

TEST_CASE("one side of this host alone")
{
    event opened{}, accepted{};
    opened.connection.flags = CONNECTION_CLIENT;
    CHECK(Filter{}.matches(opened, no_names));
    CHECK(Filter{}.matches(accepted, no_names));
    CHECK(Filter{.side = Side::client, .upstreams = {}, .processes = {}}.matches(opened, no_names));
    CHECK_FALSE(Filter{.side = Side::client, .upstreams = {}, .processes = {}}.matches(accepted, no_names));
    CHECK_FALSE(Filter{.side = Side::server, .upstreams = {}, .processes = {}}.matches(opened, no_names));
    CHECK(Filter{.side = Side::server, .upstreams = {}, .processes = {}}.matches(accepted, no_names));
}

TEST_CASE("on an accepted connection this host is the upstream")
{
    event e = crossing();
    e.connection.flags &= ~static_cast<std::uint32_t>(CONNECTION_CLIENT);
    CHECK(Filter{.upstreams = {parse_address_pattern("10.0.0.1:41234")}, .processes = {}}.matches(e, no_names));
    CHECK_FALSE(Filter{.upstreams = {parse_address_pattern("10.0.0.2:8000")}, .processes = {}}.matches(e, no_names));
}

TEST_CASE("a name that the kernel did not note comes from /proc, any bytes of it")
{
    const LiveProcessNames names;
    event e = crossing();
    CHECK(process_name(e.connection, names) == "nginx");
    set_name(e, "");
    e.connection.pid = static_cast<std::uint32_t>(::getpid());
    std::array<char, 16> before{};
    REQUIRE(::prctl(PR_GET_NAME, before.data()) == 0);
    REQUIRE(::prctl(PR_SET_NAME, "odd \xff\n name") == 0);
    CHECK(process_name(e.connection, names) == "odd \xff\n name");
    const Filter by_process{.upstreams = {}, .processes = {ProcessPattern{.pid = {}, .name = "odd \xff\n name"}}};
    CHECK(by_process.matches(e, names));
    set_name(e, "ThreadPoolForeg"); // the thread that connected
    CHECK(by_process.matches(e, names));
    CHECK(process_name(e.connection, names) == "ThreadPoolForeg");
    set_name(e, "");
    ::prctl(PR_SET_NAME, before.data());
    e.connection.pid = 0;
    CHECK(process_name(e.connection, names).empty());
    CHECK_FALSE(Filter{.upstreams = {}, .processes = {ProcessPattern{.pid = {}, .name = ""}}}.matches(e, no_names));
}

TEST_CASE("capabilities that are missing are named")
{
    CHECK(parse_effective_capabilities("Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n") ==
          0x1ffffffffffULL);
    CHECK(missing_capabilities(0x1ffffffffffULL).empty());
    CHECK(missing_capabilities(0) == std::vector<std::string>{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"});
    CHECK(missing_capabilities(1ULL << 21U).empty()); // CAP_SYS_ADMIN
    CHECK(missing_capabilities(1ULL << 39U | 1ULL << 12U) == std::vector<std::string>{"CAP_PERFMON"});
}
