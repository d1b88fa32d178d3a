// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/advice.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

namespace finrace {

namespace {

constexpr std::array proxies{
    IdleSetting{.software = "nginx",
                .process = "nginx",
                .setting = "keepalive_timeout {}s;",
                .where = "in its upstream block, beside keepalive",
                .unit = Unit::seconds,
                .default_ms = 60'000,
                .source = "nginx.org/en/docs/http/ngx_http_upstream_module.html#keepalive_timeout (1.15.3)"},
    IdleSetting{.software = "HAProxy",
                .process = "haproxy",
                .setting = "",
                .where = "HAProxy has no idle limit towards servers: only the upstream's can be raised. Where requests "
                         "may be repeated, \"retry-on conn-failure empty-response\" hides the races",
                .unit = Unit::milliseconds,
                .default_ms = 0,
                .source = "haproxy mux_h1.c, h1_refresh_timeout(); issue 1236"},
    IdleSetting{.software = "Apache httpd",
                .process = "apache2",
                .setting = "ttl={}",
                .where = "in its ProxyPass or BalancerMember; without it there is no limit",
                .unit = Unit::seconds,
                .default_ms = 0,
                .source = "httpd.apache.org/docs/2.4/mod/mod_proxy.html#proxypass"},
    IdleSetting{.software = "Apache httpd",
                .process = "httpd",
                .setting = "ttl={}",
                .where = "in its ProxyPass or BalancerMember; without it there is no limit",
                .unit = Unit::seconds,
                .default_ms = 0,
                .source = "httpd.apache.org/docs/2.4/mod/mod_proxy.html#proxypass"},
    IdleSetting{.software = "Caddy",
                .process = "caddy",
                .setting = "keepalive {}s",
                .where = "in reverse_proxy's transport http block",
                .unit = Unit::seconds,
                .default_ms = 120'000,
                .source = "caddyserver.com/docs/caddyfile/directives/reverse_proxy"},
    IdleSetting{.software = "Varnish",
                .process = "cache-",
                .setting = "backend_idle_timeout={}",
                .where = "varnishd -p, or param.set",
                .unit = Unit::seconds,
                .default_ms = 60'000,
                .source = "varnishd(1), backend_idle_timeout"},
    IdleSetting{.software = "Squid",
                .process = "squid",
                .setting = "server_idle_pconn_timeout {} seconds",
                .where = "in squid.conf",
                .unit = Unit::seconds,
                .default_ms = 60'000,
                .source = "squid.conf, server_idle_pconn_timeout"},
    IdleSetting{.software = "Envoy",
                .process = "wrk:worker",
                .setting = "idle_timeout: {}s",
                .where = "in the cluster's common_http_protocol_options",
                .unit = Unit::seconds,
                .default_ms = 3'600'000,
                .source = "envoyproxy.io, faq/configuration/timeouts"},
    IdleSetting{.software = "Traefik",
                .process = "traefik",
                .setting = "idleConnTimeout: {}s",
                .where = "in the serversTransport's forwardingTimeouts",
                .unit = Unit::seconds,
                .default_ms = 90'000,
                .source = "doc.traefik.io, serversTransport"},
};

constexpr std::array servers{
    IdleSetting{.software = "uvicorn",
                .process = "uvicorn",
                .setting = "uvicorn --timeout-keep-alive {}",
                .where = "",
                .unit = Unit::seconds,
                .default_ms = 5000,
                .source = "uvicorn config.py, timeout_keep_alive"},
    IdleSetting{.software = "gunicorn",
                .process = "gunicorn",
                .setting = "gunicorn --keep-alive {}",
                .where = "also where its workers are uvicorn's",
                .unit = Unit::seconds,
                .default_ms = 2000,
                .source = "docs.gunicorn.org, settings: keepalive"},
    IdleSetting{.software = "Node.js",
                .process = "node",
                .setting = "server.keepAliveTimeout = {}",
                .where = "with server.headersTimeout above it",
                .unit = Unit::milliseconds,
                .default_ms = 5000,
                .source = "nodejs.org/api/http.html#serverkeepalivetimeout"},
};

constexpr std::uint32_t second_ms = 1000;
/// The rule: the proxy closes a second before the upstream, or the upstream waits five seconds longer than the proxy.
constexpr std::uint32_t proxy_ahead_ms = second_ms;
constexpr std::uint32_t upstream_behind_ms = 5 * second_ms;
constexpr std::uint32_t longest_ms = 1'000'000'000; ///< beyond it nothing is to be reckoned
constexpr std::uint32_t hair_ms = 20;
/// What the upstream waits for at least, where nothing limits the proxy.
constexpr std::uint32_t long_enough_ms = 65 * second_ms;

std::uint32_t rounded_up(std::uint32_t ms)
{
    return (ms + second_ms - 1) / second_ms * second_ms;
}

std::string seconds(std::uint32_t ms)
{
    return ms % second_ms == 0 ? fmt::format("{} s", ms / second_ms) : fmt::format("{:.1f} s", ms / 1e3);
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
    const auto* found = std::find_if(proxies.begin(), proxies.end(),
                                     [&](const IdleSetting& one) { return process.starts_with(one.process); });
    return found != proxies.end() ? found : nullptr;
}

std::string written(const IdleSetting& setting, std::uint32_t value_ms)
{
    std::string text(setting.setting);
    const std::size_t place = text.find("{}");
    return text.replace(place, 2, std::to_string(setting.unit == Unit::seconds ? value_ms / second_ms : value_ms));
}

std::vector<Remedy> remedies(const IdleTimeout& timeout, const std::optional<IdleTimeout>& own_limit,
                             std::string_view process)
{
    std::vector<Remedy> ways;
    const IdleSetting* proxy = setting_of_proxy(process);
    // A limit below the upstream's timer is not what keeps these connections: the upstream closed them first.
    const bool own_counts = own_limit && own_limit->highest_ms > timeout.ms;
    const bool default_counts = !own_counts && proxy != nullptr && proxy->default_ms > timeout.ms;
    const std::uint32_t limit_ms = own_counts ? own_limit->highest_ms : default_counts ? proxy->default_ms : 0;

    Remedy raise{.end = Remedy::End::upstream, .settings = {}, .why = {}};
    const std::uint32_t raised_ms = rounded_up(
        limit_ms != 0 ? limit_ms + upstream_behind_ms : std::max(long_enough_ms, 2 * std::min(timeout.ms, longest_ms)));
    for (const IdleSetting& server : servers)
        raise.settings.push_back(
            {.software = server.software, .text = written(server, raised_ms), .note = server.where});
    if (own_counts)
        raise.why = fmt::format("this host closes its idle connections after {}", seconds(own_limit->highest_ms));
    else if (default_counts)
        raise.why = fmt::format("{} keeps idle connections for {}, unless it is told otherwise", proxy->software,
                                seconds(limit_ms));
    else
        raise.why = "nothing is known to limit this host's idle connections: the longer the upstream waits, the fewer "
                    "races are left";
    ways.push_back(std::move(raise));

    // A timer of less than two seconds leaves no room for a setting in whole ones. Timers are looked at early by a
    // hair.
    const std::uint32_t room_ms = timeout.lowest_ms + hair_ms;
    const std::uint32_t lowered_ms =
        room_ms >= 2 * proxy_ahead_ms ? (room_ms - proxy_ahead_ms) / second_ms * second_ms : 0;
    if (lowered_ms == 0) {
        ways.push_back(
            {.end = Remedy::End::proxy,
             .settings = {},
             .why = fmt::format("no limit there is worth it, for the upstream closes after {}", seconds(timeout.ms))});
    } else if (proxy == nullptr) {
        ways.push_back({.end = Remedy::End::proxy,
                        .settings = {},
                        .why = fmt::format("whatever keeps these connections on this host must close them after {} of "
                                           "rest, before the upstream does",
                                           seconds(lowered_ms))});
    } else if (proxy->setting.empty()) {
        ways.push_back({.end = Remedy::End::proxy, .settings = {}, .why = std::string(proxy->where)});
    } else {
        ways.push_back(
            {.end = Remedy::End::proxy,
             .settings = {{.software = proxy->software, .text = written(*proxy, lowered_ms), .note = proxy->where}},
             .why = fmt::format("a second before the upstream, which closes after {}", seconds(timeout.ms))});
    }
    return ways;
}

} // namespace finrace
