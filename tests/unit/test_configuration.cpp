// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What proxies and servers are told, read from their files and command lines.
#include <catch2/catch.hpp>

#include <map>
#include <string>
#include <vector>

#include <arpa/inet.h>

#include "source/configuration.h"

using namespace finrace;

namespace {

UpstreamKey at(const char* address, std::uint16_t port)
{
    UpstreamKey key;
    key.family = ::inet_pton(AF_INET, address, key.address.data()) == 1 ? 4 : 6;
    if (key.family == 6)
        REQUIRE(::inet_pton(AF_INET6, address, key.address.data()) == 1);
    key.port = port;
    return key;
}

/// Files by their names; a name that ends in "*" stands for all that begin so.
struct Disk {
    std::map<std::string, std::string> files;
    std::int64_t modified_s = 0;

    OpenFiles opener() const
    {
        return [this](const std::string& path) {
            std::vector<ConfigurationFile> found;
            for (const auto& [name, text] : files)
                if (path.ends_with("*") ? name.starts_with(path.substr(0, path.size() - 1)) : name == path)
                    found.push_back({.path = name, .text = text, .modified_s = modified_s});
            return found;
        };
    }
};

ProcessFacts process(const char* name, std::vector<std::string> arguments)
{
    return {.pid = 7,
            .name = name,
            .arguments = std::move(arguments),
            .environment = {},
            .directory = "/srv",
            .started_s = 1000};
}

std::vector<Present> proxy(const ProcessFacts& facts, const UpstreamKey& upstream, const Disk& disk)
{
    const IdleSetting* software = setting_of_proxy(facts.name);
    REQUIRE(software != nullptr);
    return present_of_proxy(*software, facts, upstream, disk.opener());
}

std::vector<Present> server(const ProcessFacts& facts, const Disk& disk = {})
{
    const IdleSetting* software = setting_of_server(facts.name, facts.arguments);
    REQUIRE(software != nullptr);
    return present_of_server(*software, facts, disk.opener());
}

Present told(std::uint32_t ms, std::string text, std::string place, bool pending = false)
{
    return {.ms = ms, .text = std::move(text), .place = std::move(place), .pending = pending};
}

using All = std::vector<Present>;

const ProcessFacts nginx_process =
    process("nginx", {"nginx: master process /usr/sbin/nginx -g daemon on; master_process on;"});

} // namespace

TEST_CASE("nginx: the upstream block that names the address", "[configuration]")
{
    Disk disk{
        .files = {{"/etc/nginx/nginx.conf", "user www-data;\n"
                                            "http {\n"
                                            "    keepalive_timeout 65;\n"
                                            "    include conf.d/*;\n"
                                            "}\n"},
                  {"/etc/nginx/conf.d/app.conf", "upstream app { # the application\n"
                                                 "    server 10.0.0.5:8000 weight=2;\n"
                                                 "    keepalive 16;\n"
                                                 "    keepalive_timeout 1m30s;\n"
                                                 "}\n"
                                                 "server { location / { proxy_pass http://app; } }\n"},
                  {"/etc/nginx/conf.d/other.conf", "upstream other { server [::1]:8000; server backend:9000; }\n"}}};
    CHECK(proxy(nginx_process, at("10.0.0.5", 8000), disk) ==
          All{told(90'000, "keepalive_timeout 1m30s;", "/etc/nginx/conf.d/app.conf:4")});
    CHECK(proxy(nginx_process, at("::1", 8000), disk) ==
          All{told(60'000, "", "upstream other, /etc/nginx/conf.d/other.conf:1")});
    SECTION("a name may stand for any address, a literal one for itself")
    {
        CHECK(proxy(nginx_process, at("192.0.2.1", 9000), disk) ==
              All{told(60'000, "", "upstream other, /etc/nginx/conf.d/other.conf:1")});
        CHECK(proxy(nginx_process, at("10.0.0.6", 8000), disk).empty());
    }
    SECTION("a file that is newer than the process")
    {
        disk.modified_s = 1001;
        const auto present = proxy(nginx_process, at("10.0.0.5", 8000), disk);
        REQUIRE(present.size() == 1);
        CHECK(present.front().pending);
        CHECK(!End{.software = nullptr, .pid = 0, .present = present}.limit_ms());
    }
    SECTION("where it is told to look")
    {
        const Disk elsewhere{
            .files = {{"/opt/n/my.conf", "upstream a { server 10.0.0.5:8000; keepalive_timeout 500ms; }"}}};
        CHECK(proxy(process("nginx", {"nginx: master process nginx -p /opt/n -c my.conf"}), at("10.0.0.5", 8000),
                    elsewhere) == All{told(500, "keepalive_timeout 500ms;", "/opt/n/my.conf:1")});
    }
}

TEST_CASE("nginx: what is not its directives does not lead astray", "[configuration]")
{
    const Disk disk{.files = {{"/etc/nginx/nginx.conf",
                               "# upstream a { server 10.0.0.5:8000; keepalive_timeout 1s; }\n"
                               "map $a $b { default 'upstream a { server 10.0.0.5:8000; }'; }\n"
                               "content_by_lua_block { if x then y = { 1 } end }\n"
                               "log_format x \"${a};{\\\"}\";\n"
                               "upstream \"a\" { server 10.0.0.5:8000; keepalive_timeout ${t}; }\n"
                               "include nginx.conf;\n" // in a circle
                               "upstream cut { server 10.0.0.5:8000"}}};
    const auto present = proxy(nginx_process, at("10.0.0.5", 8000), disk);
    REQUIRE(present.size() == 1);
    CHECK(present.front() == told(60'000, "", "upstream a, /etc/nginx/nginx.conf:5"));
    SECTION("nor do more blocks within each other than anybody has")
    {
        std::string text = "http { ";
        for (int i = 0; i < 1000; ++i)
            text += "a { ";
        text += "upstream deep { server 10.0.0.5:8000; }" + std::string(1000, '}');
        text += "upstream u { server 10.0.0.5:8000; keepalive_timeout 7s; } }";
        const Disk deep{.files = {{"/etc/nginx/nginx.conf", text}}};
        CHECK(proxy(nginx_process, at("10.0.0.5", 8000), deep) ==
              All{told(7000, "keepalive_timeout 7s;", "/etc/nginx/nginx.conf:1")});
    }
}

TEST_CASE("HAProxy: its server lines", "[configuration]")
{
    const Disk disk{
        .files = {{"/etc/haproxy/haproxy.cfg", "backend a\n"
                                               "    server one ipv4@10.0.0.5:8000 check # not 10.0.0.6:8000\n"
                                               "    server \"two\" [::1]:8000\n"
                                               "listen b\n"
                                               "    server three app.internal:9000\n"}}};
    const ProcessFacts haproxy = process("haproxy", {"/usr/sbin/haproxy", "-Ws", "-f", "/etc/haproxy/haproxy.cfg"});
    CHECK(proxy(haproxy, at("10.0.0.5", 8000), disk) ==
          All{told(0, "server one ipv4@10.0.0.5:8000", "/etc/haproxy/haproxy.cfg:2")});
    CHECK(proxy(haproxy, at("::1", 8000), disk) == All{told(0, "server two [::1]:8000", "/etc/haproxy/haproxy.cfg:3")});
    CHECK(proxy(haproxy, at("10.9.9.9", 9000), disk) ==
          All{told(0, "server three app.internal:9000", "/etc/haproxy/haproxy.cfg:5")});
    CHECK(proxy(haproxy, at("10.0.0.6", 8000), disk).empty());
    SECTION("a name that fits no line is shortened")
    {
        const Disk large{
            .files = {{"/etc/haproxy/haproxy.cfg", "server " + std::string(5000, 'a') + " 10.0.0.5:8000\n"}}};
        const auto present = proxy(haproxy, at("10.0.0.5", 8000), large);
        REQUIRE(present.size() == 1);
        CHECK(present.front().text.size() < 200);
    }
}

TEST_CASE("Apache httpd: ttl, wherever it may stand", "[configuration]")
{
    const ProcessFacts apache = process("apache2", {"/usr/sbin/apache2", "-k", "start"});
    const auto present = [&](std::string site) {
        const Disk disk{.files = {{"/etc/apache2/apache2.conf", "Define PORT 8000\nIncludeOptional sites-enabled/*\n"},
                                  {"/etc/apache2/sites-enabled/app.conf", std::move(site)}}};
        return proxy(apache, at("10.0.0.5", 8000), disk);
    };
    const std::string file = "/etc/apache2/sites-enabled/app.conf";
    CHECK(present("ProxyPass \"/\" \"http://10.0.0.5:${PORT}/\" \\\n timeout=5 ttl=4\n") ==
          All{told(4000, "ttl=4", "ProxyPass http://10.0.0.5:8000/, " + file + ":1")});
    CHECK(present("<Location /a>\nproxypass http://10.0.0.5:8000/a\n</Location>\n") ==
          All{told(0, "", "proxypass http://10.0.0.5:8000/a, " + file + ":2")});
    CHECK(present("<Proxy balancer://x>\n BalancerMember http://10.0.0.5:8000 TTL=3\n</Proxy>\n") ==
          All{told(3000, "TTL=3", "BalancerMember http://10.0.0.5:8000, " + file + ":2")});
    CHECK(present("<Proxy http://10.0.0.5:8000>\n ProxySet ttl=3\n</Proxy>\nProxyPass / http://10.0.0.5:8000/\n") ==
          All{told(3000, "ttl=3", "ProxySet http://10.0.0.5:8000, " + file + ":2")});
    CHECK(present("# ProxyPass / http://10.0.0.5:8000/\nProxyPass /b http://10.0.0.6:8000/\n").empty());
    SECTION("two places: the longest counts, and none is the longest")
    {
        const auto both = present("ProxyPass /a http://10.0.0.5:8000/a ttl=4\nProxyPass /b http://10.0.0.5:8000/b\n");
        CHECK(both.size() == 2);
        CHECK(End{.software = nullptr, .pid = 0, .present = both}.limit_ms() == 0U);
    }
    SECTION("nobody's report grows without end, nor does the time that it takes")
    {
        std::string text;
        for (int i = 0; i < 20'000; ++i)
            text += "ProxySet http://10.0.0.5:8000\n";
        CHECK(present(text).size() == 16);
        std::string many;
        for (int i = 0; i < 100; ++i)
            many += "ProxyPass /" + std::to_string(i) + " http://10.0.0.5:8000/ ttl=60\n";
        const auto told_of = present(many + "ProxyPass /b http://10.0.0.5:8000/ ttl=300\n");
        CHECK(told_of.size() == 16);
        CHECK(End{.software = nullptr, .pid = 0, .present = told_of}.limit_ms() == 300'000U);
    }
    SECTION("what is defined does not grow without end")
    {
        std::string text = "Define A " + std::string(256, 'a') + "\n";
        for (int i = 0; i < 1000; ++i)
            text += "${A}";
        CHECK(present(text).empty());
    }
}

TEST_CASE("servers: flags, environment, files, defaults", "[configuration]")
{
    const std::string place = "command line of process 7";
    CHECK(server(process("uvicorn", {"/usr/bin/python3", "/usr/bin/uvicorn", "app:app", "--timeout-keep-alive",
                                     "9"})) == All{told(9000, "--timeout-keep-alive 9", place)});
    CHECK(server(process("python3", {"python3", "-m", "uvicorn", "--timeout-keep-alive=9", "app:app"})) ==
          All{told(9000, "--timeout-keep-alive 9", place)});
    CHECK(server(process("uvicorn", {"uvicorn", "app:app"})) == All{told(5000, "", place)});
    CHECK(server(process("uvicorn", {"uvicorn", "--timeout-keep-alive", "soon"})).empty());
    CHECK(server(process("hypercorn", {"hypercorn", "-c", "h.toml", "app:app"})).empty());
    CHECK(server(process("node", {"node", "server.js"})).empty());
    SECTION("the environment")
    {
        ProcessFacts facts = process("uvicorn", {"uvicorn", "app:app"});
        facts.environment["UVICORN_TIMEOUT_KEEP_ALIVE"] = "30";
        CHECK(server(facts) == All{told(30'000, "UVICORN_TIMEOUT_KEEP_ALIVE 30", "environment of process 7")});
    }
    SECTION("gunicorn's file, and what goes before it")
    {
        const Disk disk{.files = {{"/srv/gunicorn.conf.py", "threads = 4\nkeepalive = 75  # seconds\n"},
                                  {"/srv/other.py", "import os\nkeepalive = int(os.environ['K'])\n"}}};
        CHECK(server(process("gunicorn", {"gunicorn", "app:app"}), disk) ==
              All{told(75'000, "keepalive = 75", "/srv/gunicorn.conf.py:2")});
        CHECK(server(process("gunicorn", {"gunicorn", "--keep-alive", "3", "app:app"}), disk) ==
              All{told(3000, "--keep-alive 3", place)});
        CHECK(server(process("gunicorn", {"gunicorn", "-c", "other.py", "app:app"}), disk).empty());
        // It runs, so that file was there: what it says is not known.
        CHECK(server(process("gunicorn", {"gunicorn", "-c", "absent.py", "-k", "gthread", "app:app"}), disk).empty());
        CHECK(server(process("gunicorn", {"gunicorn", "-k", "gthread", "app:app"}), {}) == All{told(2000, "", place)});
        for (const std::string directory : {"", "/srv/app/1 (deleted)"}) {
            ProcessFacts elsewhere = process("gunicorn", {"gunicorn", "-k", "gthread", "app:app"});
            elsewhere.directory = directory;
            CHECK(server(elsewhere, {}).empty());
        }
        // Sync workers keep no connection, whatever they are told.
        CHECK(
            server(process("gunicorn", {"gunicorn", "-c", "absent.py", "--keep-alive", "9", "app:app"}), disk).empty());
        CHECK(server(process("gunicorn", {"gunicorn", "-c", "python:conf", "app:app"}), disk).empty());
        ProcessFacts facts = process("gunicorn", {"gunicorn", "app:app"});
        facts.environment["GUNICORN_CMD_ARGS"] = "--workers 2 --keep-alive 11";
        CHECK(server(facts, disk) == All{told(11'000, "--keep-alive 11", "GUNICORN_CMD_ARGS of process 7")});
        facts.environment["GUNICORN_CMD_ARGS"] = "-kgthread";
        CHECK(server(facts, {}) == All{told(2000, "", place)});
        CHECK(server(process("gunicorn", {"gunicorn: master [app:app]"}), disk).empty()); // its title
    }
    SECTION("gunicorn's file: only a plain assignment counts, by its whole name")
    {
        const auto told_by = [&](const std::string& text) {
            const Disk disk{.files = {{"/srv/gunicorn.conf.py", "threads = 4\n" + text}}};
            return server(process("gunicorn", {"gunicorn", "app:app"}), disk);
        };
        CHECK(told_by("my_keepalive = 75\nkeepalive_more = 1\n") == All{told(2000, "", place)});
        CHECK(told_by("if x:\n    keepalive = 75\n").empty());
        CHECK(told_by("keepalive = 7 + 5\n").empty());
    }
}

TEST_CASE("gunicorn's limit of a worker's silence", "[configuration]")
{
    const std::string place = "command line of process 7";
    const Disk disk{.files = {{"/srv/gunicorn.conf.py", "graceful_timeout = 9\ntimeout = 12\n"}}};
    const auto limit = [](const ProcessFacts& facts, const Disk& there) {
        return worker_limit_of_server(*setting_of_server(facts.name, facts.arguments), facts, there.opener());
    };
    CHECK(limit(process("gunicorn", {"gunicorn", "app:app"}), {}) == All{told(30'000, "", place)});
    CHECK(limit(process("gunicorn", {"gunicorn", "app:app"}), disk) ==
          All{told(12'000, "timeout = 12", "/srv/gunicorn.conf.py:2")});
    CHECK(limit(process("gunicorn", {"gunicorn", "--timeout", "3", "app:app"}), disk) ==
          All{told(3000, "--timeout 3", place)});
    CHECK(limit(process("gunicorn", {"gunicorn", "-t", "4", "app:app"}), disk) == All{told(4000, "-t 4", place)});
    CHECK(limit(process("gunicorn", {"gunicorn", "-k", "gevent", "app:app"}), disk) ==
          All{told(12'000, "timeout = 12", "/srv/gunicorn.conf.py:2")});
    CHECK(limit(process("uvicorn", {"uvicorn", "app:app"}), disk).empty());
    CHECK(limit(process("gunicorn", {"gunicorn: master [app:app]"}), disk).empty());
}

TEST_CASE("a server is known by its name, or by what its interpreter runs", "[configuration]")
{
    const auto name = [](const char* comm, const std::vector<std::string>& arguments) -> std::string {
        const IdleSetting* software = setting_of_server(comm, arguments);
        return software != nullptr ? std::string(software->software) : "";
    };
    CHECK(name("node", {}) == "Node.js");
    CHECK(name("python3", {"/usr/bin/python3", "-m", "gunicorn", "app"}) == "gunicorn");
    CHECK(name("ruby", {"ruby", "/usr/bin/puma", "-p", "1"}) == "Puma");
    CHECK(name("java", {"java", "-cp", "a.jar", "org.apache.catalina.startup.Bootstrap", "start"}) == "Tomcat");
    // What a program of one's own is given is not what it is.
    CHECK(name("python3", {"python3", "main.py", "uvicorn"}).empty());
    CHECK(name("python3", {"python3", "/srv/uvicorn/main.py"}).empty());
    CHECK(name("python3", {}).empty());
}
