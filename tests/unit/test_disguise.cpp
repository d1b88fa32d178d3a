// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Addresses in disguise, and the names that people give to upstreams.
#include <string>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "cli/upstream_names.h"
#include "folder.h"
#include "sink/disguise.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr auto clients = Disguise::Scope::clients;
constexpr auto all = Disguise::Scope::all;

Json record(const std::string& side)
{
    Json made = Json::parse(
        R"({"network": {"local": {"address": "10.1.2.3", "port": 1}, "peer": {"address": "2001:db8:1:2::9", "port": 2}},
        "finrace": {"outcome": {"client_address": "192.0.2.77", "retry": {"peer_address": "10.9.9.9"}}}})");
    made["finrace"]["side"] = side;
    return made;
}

std::string at(const Json& made, const char* path)
{
    return made[Json::json_pointer(path)].get<std::string>();
}

UpstreamKey key_of(std::uint8_t last, std::uint16_t port)
{
    return {.address = {10, 0, 0, last}, .port = port};
}

} // namespace

TEST_CASE("a masked address is its network's")
{
    const Disguise mask(Disguise::Way::mask, clients);
    CHECK(mask.of("192.0.2.77") == "192.0.2.0");
    CHECK(mask.of("2001:db8:1:2::9") == "2001:db8:1::");
    CHECK(mask.of("2002:c000:24d:2::9") == "2002:c000:200::"); // 192.0.2.77's, by 6to4
    CHECK(mask.of("no address") == "no address");
    for (const char* loopback : {"127.0.0.1", "127.1.2.3", "::1"})
        CHECK(mask.of(loopback) == loopback);
    CHECK(Disguise().of("192.0.2.77") == "192.0.2.77");
}

TEST_CASE("a hashed address is a pseudonym that stays the same under the same key")
{
    const Disguise hash(Disguise::Way::hash, clients, "0123456789abcdef");
    const std::string pseudonym = hash.of("192.0.2.77");
    // HMAC-SHA-256 of the four bytes c0 00 02 4d, its first eight bytes; openssl dgst -sha256 -hmac 0123456789abcdef
    CHECK(pseudonym == "100::5868:6bce:a97a:d348");
    CHECK(hash.of("192.0.2.77") == pseudonym);
    CHECK(hash.of("192.0.2.78") != pseudonym);
    CHECK(hash.of("2001:db8::9").starts_with("100::"));
    CHECK(hash.of("127.0.0.1") == "127.0.0.1");
    CHECK(Disguise(Disguise::Way::hash, clients, "0123456789abcdee").of("192.0.2.77") != pseudonym);
}

TEST_CASE("whose addresses are disguised")
{
    const Disguise of_clients(Disguise::Way::mask, clients);
    Json made = record("client");
    of_clients.apply(made);
    CHECK(at(made, "/finrace/outcome/client_address") == "192.0.2.0");
    CHECK(at(made, "/network/peer/address") == "2001:db8:1:2::9");
    CHECK(at(made, "/network/local/address") == "10.1.2.3");
    CHECK(of_clients.of_upstream("10.9.9.9") == "10.9.9.9");

    made = record("server");
    of_clients.apply(made);
    CHECK(at(made, "/network/peer/address") == "2001:db8:1::");
    CHECK(at(made, "/network/local/address") == "10.1.2.3");

    const Disguise of_all(Disguise::Way::mask, all);
    made = record("client");
    of_all.apply(made);
    CHECK(made.dump().find(".77") == std::string::npos);
    CHECK(at(made, "/network/peer/address") == "2001:db8:1::");
    CHECK(at(made, "/network/local/address") == "10.1.2.0");
    CHECK(at(made, "/finrace/outcome/retry/peer_address") == "10.9.9.0");
    CHECK(of_all.of_upstream("10.9.9.9") == "10.9.9.0");

    Json health = Json::parse(R"({"finrace": {"health": {}}})");
    const Json before = health;
    of_all.apply(health);
    CHECK(health == before);
}

TEST_CASE("the first name whose pattern matches is the upstream's")
{
    UpstreamNames names;
    names.add("10.0.0.5:8000=billing");
    names.add("10.0.0.0/24=rest = of it");
    names.add(":9000=anywhere");
    CHECK(names.of(key_of(5, 8000)) == "billing");
    CHECK(names.of(key_of(5, 8001)) == "rest = of it");
    CHECK(names.of({.address = {10, 0, 1, 1}, .port = 9000}) == "anywhere");
    CHECK(names.of({.address = {10, 0, 1, 1}, .port = 80}).empty());
    for (const std::string text : {"", "10.0.0.1", "10.0.0.1=", "host=name", "=name", "10.0.0.1=a\nb", "10.0.0.1=\xff"})
        CHECK_THROWS_AS(names.add(text), UsageError);
}

TEST_CASE("a key for pseudonyms")
{
    const Folder folder;
    AddressOptions options;
    options.hashed = all;
    options.key_path = folder.holding("key", "0123456789abcdef");
    CHECK(options.disguise().of("192.0.2.77") ==
          Disguise(Disguise::Way::hash, all, "0123456789abcdef").of("192.0.2.77"));
    options.key_path = folder.holding("key", "0123456789abcde");
    CHECK_THROWS_WITH(options.disguise(), Catch::Contains("15 bytes are too few"));
    options.key_path = folder.at("none");
    CHECK_THROWS_WITH(options.disguise(), Catch::Contains("No such file"));
    options.key_path = "";
    CHECK(options.disguise().of("192.0.2.77") != options.disguise().of("192.0.2.77")); // a new key each time
    options.masked = clients;
    CHECK_THROWS_AS(options.disguise(), UsageError);
    options.hashed.reset();
    options.key_path = folder.holding("key", "0123456789abcdef");
    CHECK_THROWS_WITH(options.disguise(), Catch::Contains("--hash-key"));
}

TEST_CASE("upstreams that have one masked address can be told apart, within a run")
{
    const auto upstream = [](const std::string& address) {
        Json made = Json::parse(R"({"event": {"name": "finrace.upstream"}, "finrace": {"upstream": {}}})");
        made["network"]["peer"]["address"] = address;
        return made;
    };
    const auto id_by = [&](const Disguise& disguise, const std::string& address) {
        Json made = upstream(address);
        disguise.apply(made);
        return made["finrace"]["upstream"].value("id", "");
    };
    const Disguise mask(Disguise::Way::mask, all, "0123456789abcdef");
    CHECK(id_by(mask, "10.0.0.5").size() == 16);
    CHECK(id_by(mask, "10.0.0.5") == id_by(mask, "10.0.0.5"));
    CHECK(id_by(mask, "10.0.0.5") != id_by(mask, "10.0.0.6"));
    CHECK(id_by(mask, "10.0.0.5") != id_by(Disguise(Disguise::Way::mask, all, "0123456789abcdee"), "10.0.0.5"));
    CHECK(id_by(mask, "127.0.0.1").empty());
    CHECK(id_by(Disguise(Disguise::Way::mask, clients, "0123456789abcdef"), "10.0.0.5").empty());
    CHECK(id_by(Disguise(Disguise::Way::hash, all, "0123456789abcdef"), "10.0.0.5").empty());
}

TEST_CASE("a unit that is named by its connection's ends is told without them")
{
    const auto told = [](const std::string& unit) {
        Json made = Json::object();
        made["finrace"]["systemd_unit"] = unit;
        made["process"]["linux"]["cgroup"] = "/system.slice/system-log.slice/" + unit;
        Disguise(Disguise::Way::mask, clients, "0123456789abcdef").apply(made);
        CHECK(at(made, "/process/linux/cgroup") ==
              "/system.slice/system-log.slice/" + at(made, "/finrace/systemd_unit"));
        return at(made, "/finrace/systemd_unit");
    };
    CHECK(told("log@7-10.0.0.1:514-192.0.2.77:40112.service") == "log@.service");
    CHECK(told("log@7-2001:db8::1:514-2001:db8::9:40112.service") == "log@.service");
    CHECK(told("user@1000.service") == "user@1000.service");
    CHECK(told("nginx.service") == "nginx.service");
    CHECK(told("odd@") == "odd@");
    CHECK(told("@a:b") == "@a:b");
}
