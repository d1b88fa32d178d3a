// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/software.h"

#include <algorithm>

namespace finrace {

namespace {

constexpr std::array proxies{
    IdleSetting{.software = "nginx",
                .processes = {"nginx", "nginx-debug"},
                .setting = "keepalive_timeout {}s;",
                .where = "in its upstream block, beside keepalive",
                .default_ms = 60'000,
                .configuration = Configuration::nginx,
                .source = "nginx.org/en/docs/http/ngx_http_upstream_module.html#keepalive_timeout (1.15.3)"},
    // It has no idle limit towards servers; but a connection that is in no pool goes with its client's.
    IdleSetting{.software = "HAProxy",
                .processes = {"haproxy"},
                .setting = "timeout http-keep-alive {}s",
                .beside = "pool-max-conn 0",
                .beside_where =
                    "on its server line, which gives up reuse between clients; or keep it, and where requests "
                    "may be repeated \"retry-on conn-failure empty-response\" hides the races",
                .where = "in its frontend or defaults",
                .configuration = Configuration::haproxy,
                .source = "haproxy mux_h1.c, h1_refresh_timeout(); issue 1236; configuration.txt, pool-max-conn"},
    IdleSetting{.software = "Apache httpd",
                .processes = {"apache2", "httpd", "httpd-"},
                .setting = "ttl={}",
                .where = "in its ProxyPass or BalancerMember; without it, and under the prefork MPM, there is no limit",
                .configuration = Configuration::apache,
                .looked_at_on_use = true,
                .source = "httpd.apache.org/docs/2.4/mod/mod_proxy.html#proxypass"},
    IdleSetting{.software = "Caddy",
                .processes = {"caddy", "caddy_linux"},
                .setting = "keepalive {}s",
                .where = "in reverse_proxy's transport http block",
                .default_ms = 120'000,
                .source = "caddyserver.com/docs/caddyfile/directives/reverse_proxy"},
    IdleSetting{.software = "Varnish",
                .processes = {"cache-"},
                .setting = "backend_idle_timeout={}",
                .where = "varnishd -p, or param.set",
                .default_ms = 60'000,
                .source = "varnishd(1), backend_idle_timeout"},
    IdleSetting{.software = "Squid",
                .processes = {"squid"},
                .setting = "server_idle_pconn_timeout {} seconds",
                .where = "in squid.conf",
                .default_ms = 60'000,
                .source = "squid.conf, server_idle_pconn_timeout"},
    IdleSetting{.software = "Envoy",
                .processes = {"wrk:worker", "envoy"},
                .setting = "idle_timeout: {}s",
                .where = "in the cluster's common_http_protocol_options",
                .default_ms = 3'600'000,
                .source = "envoyproxy.io, faq/configuration/timeouts"},
    IdleSetting{.software = "Traefik",
                .processes = {"traefik", "traefik_linux"},
                .setting = "idleConnTimeout: {}s",
                .where = "in the serversTransport's forwardingTimeouts",
                .default_ms = 90'000,
                .source = "doc.traefik.io, serversTransport"},
};

constexpr std::array servers{
    IdleSetting{.software = "uvicorn",
                .processes = {"uvicorn"},
                .word = "uvicorn",
                .setting = "uvicorn --timeout-keep-alive {}",
                .default_ms = 5000,
                .configuration = Configuration::command_line,
                .flag = "--timeout-keep-alive",
                .variable = "UVICORN_TIMEOUT_KEEP_ALIVE",
                .source = "uvicorn config.py, timeout_keep_alive",
                .recycling = "--limit-max-requests",
                .dies_of = "it answers 500 where the application fails: so its process ended (a signal, out of memory, "
                           "--limit-max-requests, a reload), or a handler closed its transport",
                .dies_of_source = "uvicorn h11_impl.py, RequestResponseCycle.run_asgi()"},
    IdleSetting{.software = "gunicorn",
                .processes = {"gunicorn"},
                .word = "gunicorn",
                .setting = "gunicorn --keep-alive {}",
                .where = "also where its workers are uvicorn's",
                .default_ms = 2000,
                .configuration = Configuration::gunicorn,
                .flag = "--keep-alive",
                .source = "docs.gunicorn.org, settings: keepalive",
                .recycling = "--max-requests",
                .dies_of =
                    "it kills a worker that is silent for --timeout (a sync one over a long request; uvicorn's or "
                    "gevent's whose event loop a handler blocks), with all that it has under way, and logs WORKER "
                    "TIMEOUT; --max-requests and a reload end workers as well",
                .dies_of_source = "docs.gunicorn.org, settings: timeout, max_requests"},
    IdleSetting{.software = "Node.js",
                .processes = {"node", "nodejs", "node-MainThread"},
                .word = "node", // of which the main thread has been called just so
                .setting = "server.keepAliveTimeout = {}",
                .where = "with server.headersTimeout above it",
                .unit = Unit::milliseconds,
                .default_ms = 5000,
                .source = "nodejs.org/api/http.html#serverkeepalivetimeout",
                .dies_of = "an uncaught exception ends its process without a word to its clients; a handler's "
                           "socket.destroy() closes as well, and server.timeout where that is set",
                .dies_of_source = "nodejs.org/api/process.html#event-uncaughtexception, http.html#servertimeout"},
    IdleSetting{.software = "hypercorn",
                .processes = {"hypercorn"},
                .word = "hypercorn",
                .setting = "hypercorn --keep-alive {}",
                .default_ms = 5000,
                .configuration = Configuration::command_line,
                .flag = "--keep-alive",
                .source = "hypercorn.readthedocs.io, configuring: keep_alive_timeout"},
    IdleSetting{.software = "daphne",
                .processes = {"daphne"},
                .word = "daphne",
                .where = "daphne closes after Twisted's 60 s, and has no setting for it",
                .default_ms = 60'000,
                .source = "daphne http_protocol.py; Twisted http.py, _REQUEST_TIMEOUT"},
    IdleSetting{.software = "Puma",
                .processes = {"puma"},
                .word = "puma",
                .setting = "persistent_timeout {}",
                .where = "in config/puma.rb",
                .source = "puma lib/puma/dsl.rb, persistent_timeout: 20 s, from 7.0 on 65 s",
                .dies_of = "in cluster mode it kills a worker that does not report for worker_timeout, 60 s by default",
                .dies_of_source = "puma lib/puma/dsl.rb, worker_timeout"},
    IdleSetting{.software = "Tomcat",
                .processes = {"tomcat"},
                .word = "org.apache.catalina.startup.Bootstrap",
                .setting = "keepAliveTimeout=\"{}\"",
                .where = "in server.xml's Connector; without it connectionTimeout holds",
                .unit = Unit::milliseconds,
                .default_ms = 20'000,
                .source = "tomcat.apache.org/tomcat-10.1-doc/config/http.html, and the server.xml that it comes with"},
    IdleSetting{.software = "Apache httpd",
                .processes = {"apache2", "httpd", "httpd-"},
                .setting = "KeepAliveTimeout {}",
                .default_ms = 5000,
                .source = "httpd.apache.org/docs/2.4/mod/core.html#keepalivetimeout",
                .dies_of = "its error log tells of a child that ended: \"exit signal\"",
                .dies_of_source = "httpd server/mpm_unix.c, ap_process_child_status(), AH00051 and AH00052"},
    IdleSetting{.software = "nginx",
                .processes = {"nginx", "nginx-debug"},
                .setting = "keepalive_timeout {}s;",
                .where = "in its http or server block",
                .default_ms = 75'000,
                .source = "nginx.org/en/docs/http/ngx_http_core_module.html#keepalive_timeout"},
    IdleSetting{.software = "HAProxy",
                .processes = {"haproxy"},
                .setting = "timeout http-keep-alive {}s",
                .where = "in its frontend or defaults",
                .source = "haproxy configuration.txt, timeout http-keep-alive"},
    IdleSetting{.software = "Caddy",
                .processes = {"caddy", "caddy_linux"},
                .setting = "idle {}s",
                .where = "in the global options: servers, timeouts",
                .default_ms = 300'000,
                .source = "caddyserver.com/docs/caddyfile/options#timeouts"},
};

/// Behind its name a process may say more ("gunicorn: master", "gunicorn3", "cache-main", "wrk:worker_0");
/// "nginx-prometheus" and "node_exporter" are others.
bool is_called(std::string_view process, std::string_view name)
{
    if (!process.starts_with(name) || process.size() == name.size())
        return process == name;
    const auto is_word = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_';
    };
    return name.find_first_of("-_:") != std::string_view::npos || !is_word(process[name.size()]);
}

template <typename Table>
const IdleSetting* named(const Table& table, std::string_view process)
{
    const auto* found = std::find_if(table.begin(), table.end(), [&](const IdleSetting& one) {
        return std::any_of(one.processes.begin(), one.processes.end(),
                           [&](std::string_view name) { return !name.empty() && is_called(process, name); });
    });
    return found != table.end() ? found : nullptr;
}

/// "/usr/bin/gunicorn" and "gunicorn", but not "/srv/gunicorn/app.py".
std::string_view last_component(std::string_view path)
{
    return path.substr(path.rfind('/') + 1);
}

} // namespace

std::span<const IdleSetting> proxy_settings()
{
    return proxies;
}

std::span<const IdleSetting> server_settings()
{
    return servers;
}

const IdleSetting* setting_of_proxy(std::string_view process)
{
    return named(proxies, process);
}

const IdleSetting* setting_of_server(std::string_view process, const std::vector<std::string>& arguments)
{
    if (const IdleSetting* by_name = named(servers, process); by_name != nullptr)
        return by_name;
    // An interpreter: "python3 -m uvicorn …", "ruby /usr/bin/puma …", "java … org.apache.catalina.startup.Bootstrap
    // start". What follows are the program's own arguments, which may be named like anything.
    constexpr std::size_t options_before_program = 64; // java has many
    const std::size_t words = std::min(arguments.size(), options_before_program);
    for (std::size_t i = 0; i < words; ++i) {
        const auto* found = std::find_if(servers.begin(), servers.end(), [&](const IdleSetting& one) {
            return !one.word.empty() && last_component(arguments[i]) == one.word;
        });
        if (found != servers.end())
            return found;
        // The first that is neither an option nor one's value is the program.
        const bool is_option = arguments[i].starts_with("-");
        const bool is_value = i > 0 && arguments[i - 1].starts_with("-");
        if (i > 0 && !is_option && !is_value)
            break;
    }
    return nullptr;
}

std::string written(const IdleSetting& setting, std::uint32_t value_ms)
{
    constexpr std::uint32_t second_ms = 1000;
    std::string text(setting.setting);
    const std::size_t place = text.find("{}");
    return text.replace(place, 2, std::to_string(setting.unit == Unit::seconds ? value_ms / second_ms : value_ms));
}

std::optional<std::uint32_t> End::limit_ms() const
{
    if (present.empty() || std::any_of(present.begin(), present.end(), [](const Present& one) { return one.pending; }))
        return std::nullopt;
    if (std::any_of(present.begin(), present.end(), [](const Present& one) { return one.ms == 0; }))
        return 0;
    return std::max_element(present.begin(), present.end(),
                            [](const Present& one, const Present& other) { return one.ms < other.ms; })
        ->ms;
}

} // namespace finrace
