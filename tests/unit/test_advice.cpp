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

using Settings = std::vector<std::string>;

} // namespace

TEST_CASE("each row of the table can be written, and says where it is from", "[advice]")
{
    for (const auto& table : {proxy_settings(), server_settings()})
        for (const IdleSetting& row : table) {
            CAPTURE(row.software);
            CHECK(!row.process.empty());
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
    CHECK(setting_of_proxy("haproxy")->setting.empty());
    // As the thread that connects is named.
    CHECK(setting_of_proxy("cache-worker")->software == "Varnish");
    CHECK(setting_of_proxy("wrk:worker_3")->software == "Envoy");
    CHECK(setting_of_proxy("python3") == nullptr);
    CHECK(setting_of_proxy("") == nullptr);
}

TEST_CASE("the rule: the proxy a second before, or the upstream five seconds behind", "[advice]")
{
    SECTION("nginx as it comes, uvicorn as it comes")
    {
        const auto ways = remedies(timer(5000), std::nullopt, "nginx");
        CHECK(settings(ways, Remedy::End::upstream) == Settings{"uvicorn --timeout-keep-alive 65",
                                                                "gunicorn --keep-alive 65",
                                                                "server.keepAliveTimeout = 65000"});
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"keepalive_timeout 4s;"});
    }
    SECTION("a limit of this host's that was seen")
    {
        const auto ways = remedies(timer(5000), timer(75'000), "nginx");
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 80");
    }
    SECTION("a limit, or a default, below the upstream's timer is not what keeps these connections")
    {
        CHECK(settings(remedies(timer(5000), timer(250), "nginx"), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 65");
        CHECK(settings(remedies(timer(59'999), std::nullopt, "nginx"), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 65");
        CHECK(settings(remedies(timer(60'000), std::nullopt, "nginx"), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 120");
        CHECK(settings(remedies(timer(100'000), timer(250), "nginx"), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 200");
        CHECK(settings(remedies(timer(4'000'000'000), std::nullopt, "nginx"), Remedy::End::upstream).front() ==
              "uvicorn --timeout-keep-alive 2000000");
    }
    SECTION("the boundary: two seconds leave room for one")
    {
        CHECK(settings(remedies(timer(2000), std::nullopt, "nginx"), Remedy::End::proxy) ==
              Settings{"keepalive_timeout 1s;"});
        CHECK(settings(remedies(timer(1980), std::nullopt, "nginx"), Remedy::End::proxy) ==
              Settings{"keepalive_timeout 1s;"}); // a timer of two seconds, looked at a hair early
        CHECK(settings(remedies(timer(1979), std::nullopt, "nginx"), Remedy::End::proxy).empty());
    }
    SECTION("HAProxy has no such setting")
    {
        const auto ways = remedies(timer(5000), std::nullopt, "haproxy");
        CHECK(settings(ways, Remedy::End::proxy).empty());
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 65");
    }
    SECTION("nothing limits it: the upstream's limit is doubled at least")
    {
        const auto ways = remedies(timer(130'000), std::nullopt, "apache2");
        CHECK(settings(ways, Remedy::End::upstream).front() == "uvicorn --timeout-keep-alive 260");
        CHECK(settings(ways, Remedy::End::proxy) == Settings{"ttl=129"});
    }
    SECTION("a process that is not known")
    {
        const auto ways = remedies(timer(5000), std::nullopt, "python3");
        CHECK(settings(ways, Remedy::End::proxy).empty());
        CHECK(settings(ways, Remedy::End::upstream).size() == server_settings().size());
        CHECK(ways.back().why.find("4 s") != std::string::npos);
    }
}
