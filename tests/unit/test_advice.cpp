// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Settings and their values: the rule, and where a software has no such setting.
#include <catch2/catch.hpp>

#include <optional>
#include <string>
#include <vector>

#include "core/advice.h"

using namespace finrace;

namespace {

IdleTimeout timer(std::uint32_t ms)
{
    return {.ms = ms, .lowest_ms = ms, .highest_ms = ms, .samples = 5};
}

std::vector<std::string> settings(const std::vector<Remedy>& ways, Remedy::End end)
{
    std::vector<std::string> texts;
    for (const Remedy& way : ways)
        if (way.end == end)
            for (const Remedy::Setting& setting : way.settings)
                texts.push_back(setting.text);
    return texts;
}

Ends proxy(std::string_view process)
{
    Ends ends;
    ends.proxy.software = setting_of_proxy(process);
    return ends;
}

using Settings = std::vector<std::string>;

} // namespace

TEST_CASE("each row of the table can be written, and says where it is from", "[advice]")
{
    for (const auto& table : {proxy_settings(), server_settings()})
        for (const IdleSetting& row : table) {
            CAPTURE(row.software);
            CHECK(!row.processes.front().empty());
            CHECK(!row.source.empty());
            if (row.setting.empty()) {
                CHECK(!row.where.empty());
                continue;
            }
            CHECK(row.setting.find("{}") != std::string_view::npos);
            CHECK(written(row, 4000).find(row.unit == Unit::seconds ? "4" : "4000") != std::string::npos);
            CHECK(written(row, 4000).find("{}") == std::string::npos);
        }
}

TEST_CASE("a proxy is known by its process", "[advice]")
{
    CHECK(setting_of_proxy("nginx")->software == "nginx");
    CHECK(setting_of_proxy("apache2")->software == "Apache httpd");
    CHECK(setting_of_proxy("haproxy")->software == "HAProxy");
    // As the thread that connects is named.
    CHECK(setting_of_proxy("cache-worker")->software == "Varnish");
    CHECK(setting_of_proxy("wrk:worker_3")->software == "Envoy");
    CHECK(setting_of_proxy("httpd-prefork")->software == "Apache httpd");
    CHECK(setting_of_server("gunicorn: maste", {})->software == "gunicorn");
    CHECK(setting_of_server("gunicorn3", {})->software == "gunicorn");
    CHECK(setting_of_server("node_exporter", {}) == nullptr);
    CHECK(setting_of_server("node-MainThread", {})->software == "Node.js");
    CHECK(setting_of_server("MainThread", {"/usr/bin/node", "app.js"})->software == "Node.js");
    CHECK(setting_of_proxy("nginx-debug")->software == "nginx");
    CHECK(setting_of_proxy("caddy_linux_amd")->software == "Caddy");
    CHECK(setting_of_proxy("nginx-prometheu") == nullptr);
    CHECK(setting_of_proxy("traefik-forward") == nullptr);
    CHECK(setting_of_proxy("python3") == nullptr);
    CHECK(setting_of_proxy("") == nullptr);
}

TEST_CASE("the rule: the proxy a second before, or the upstream five seconds behind", "[advice]")
{
    SECTION("nginx as it comes, uvicorn as it comes")
    {
        const auto ways = remedies(timer(5000), std::nullopt, proxy("nginx"));
        CHECK(settings(ways, Remedy::End::upstream) == Settings{"uvicorn --timeout-keep-alive 65",
                                                                "gunicorn --keep-alive 65",
                                                                "server.keepAliveTimeout = 65000"});
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"keepalive_timeout 4s;"});
    }
    SECTION("a limit of this host's that was seen")
    {
        const auto ways = remedies(timer(5000), timer(75'000), proxy("nginx"));
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 80");
    }
    SECTION("a limit that ties with the upstream's")
    {
        CHECK(settings(remedies(timer(3004), timer(3000), proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 8");
    }
    SECTION("a limit, or a default, below the upstream's timer is not what keeps these connections")
    {
        CHECK(settings(remedies(timer(5000), timer(250), proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 65");
        CHECK(settings(remedies(timer(59'999), std::nullopt, proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 65");
        CHECK(settings(remedies(timer(60'000), std::nullopt, proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 120");
        CHECK(settings(remedies(timer(100'000), timer(250), proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 200");
        CHECK(settings(remedies(timer(4'000'000'000), std::nullopt, proxy("nginx")), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 2000000");
    }
    SECTION("the boundary: two seconds leave room for one")
    {
        CHECK(settings(remedies(timer(2000), std::nullopt, proxy("nginx")), Remedy::End::proxy) ==
              Settings{"keepalive_timeout 1s;"});
        CHECK(settings(remedies(timer(1980), std::nullopt, proxy("nginx")), Remedy::End::proxy) ==
              Settings{"keepalive_timeout 1s;"}); // a timer of two seconds, looked at a hair early
        CHECK(settings(remedies(timer(1979), std::nullopt, proxy("nginx")), Remedy::End::proxy).empty());
    }
    SECTION("HAProxy has no idle limit of its own, but a connection may go with its client's")
    {
        const auto ways = remedies(timer(5000), std::nullopt, proxy("haproxy"));
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"pool-max-conn 0", "timeout http-keep-alive 4s"});
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 65");
        CHECK(ways.front().end == Remedy::End::upstream); // the other way has its price
    }
    SECTION("nothing limits it: the upstream's limit is doubled at least")
    {
        const auto ways = remedies(timer(130'000), std::nullopt, proxy("apache2"));
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 260");
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"ttl=129"});
    }
    SECTION("the proxy closes first, as it is told: another process keeps these connections")
    {
        Ends ends = proxy("nginx");
        ends.proxy.present = {{.ms = 3000, .text = "keepalive_timeout 3s", .place = "there"}};
        const auto ways = remedies(timer(5000), std::nullopt, ends);
        CHECK(settings(ways, Remedy::End::proxy).empty());
        CHECK(ways.back().why.find("another process") != std::string::npos);
        Ends apache = proxy("apache2");
        apache.proxy.present = ends.proxy.present;
        CHECK(remedies(timer(5000), std::nullopt, apache).back().why.find("prefork") != std::string::npos);
        ends.proxy.present.front().ms = 4001;
        CHECK(settings(remedies(timer(5000), std::nullopt, ends), Remedy::End::proxy) ==
              Settings{"keepalive_timeout 4s;"});
    }
    SECTION("a process that is not known")
    {
        const auto ways = remedies(timer(5000), std::nullopt, proxy("python3"));
        CHECK(settings(ways, Remedy::End::proxy).empty());
        CHECK(settings(ways, Remedy::End::upstream).size() == most_common_servers);
        CHECK(ways.back().why.find("4 s") != std::string::npos);
    }
}

TEST_CASE("advice names what is there, and what holds now", "[advice]")
{
    const auto told = [](std::uint32_t ms, const char* text) {
        return std::vector<Present>{{.ms = ms, .text = text, .place = "there"}};
    };
    Ends ends = proxy("nginx");
    ends.proxy.present = told(3000, "keepalive_timeout 3s;");
    ends.upstream.software = setting_of_server("gunicorn", {});
    ends.upstream.present = told(2000, "");
    SECTION("the server that listens there, and none else")
    {
        const auto ways = remedies(timer(2000), std::nullopt, ends);
        CHECK(settings(ways, Remedy::End::upstream) == Settings{"gunicorn --keep-alive 8"}); // by what nginx is told
        CHECK(ways.front().settings.front().present == ends.upstream.present);
        CHECK(ways.back().settings.front().present == ends.proxy.present);
    }
    SECTION("a limit that is told, below the timer, is not what keeps these connections; nor is the default then")
    {
        CHECK(settings(remedies(timer(10'000), std::nullopt, ends), Remedy::End::upstream) ==
              Settings{"gunicorn --keep-alive 65"});
    }
    SECTION("a server without a setting leaves the proxy's")
    {
        ends.upstream = {.software = setting_of_server("daphne", {}), .pid = 1, .present = {}};
        ends.proxy.present = told(75'000, "keepalive_timeout 75s;");
        const auto ways = remedies(timer(60'000), std::nullopt, ends);
        CHECK(ways.front().end == Remedy::End::proxy);
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"keepalive_timeout 59s;"});
        CHECK(settings(ways, Remedy::End::upstream).empty());
        CHECK(ways.back().why.find("Twisted") != std::string::npos);
    }
    SECTION("a proxy without any limit, that can have one")
    {
        CHECK(remedies(timer(5000), std::nullopt, proxy("apache2")).front().end == Remedy::End::proxy);
    }
}
