// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/advice.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace finrace {

namespace {

constexpr std::uint32_t second_ms = 1000;
/// The rule: the proxy closes a second before the upstream, or the upstream waits five seconds longer than the proxy.
constexpr std::uint32_t proxy_ahead_ms = second_ms;
constexpr std::uint32_t upstream_behind_ms = 5 * second_ms;
constexpr std::uint32_t most_reckoned_ms = 1'000'000'000; ///< beyond it nothing is to be reckoned
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

std::vector<Remedy> remedies(const IdleTimeout& timeout, const std::optional<IdleTimeout>& own_limit, const Ends& ends,
                             std::string_view own)
{
    const IdleSetting* proxy = ends.proxy.software;
    const std::optional<std::uint32_t> told_ms = ends.proxy.limit_ms();
    // A limit below the upstream's timer is not what keeps these connections: the upstream closed them first.
    const auto reaches = [&timeout](std::uint64_t limit_ms) {
        return limit_ms + timeout.ms / 50 + hair_ms > timeout.ms;
    };
    const bool own_counts = own_limit && reaches(own_limit->highest_ms);
    const bool told_counts = !own_counts && told_ms && *told_ms != 0 && reaches(*told_ms);
    const bool default_counts = !own_counts && !told_ms && proxy != nullptr && proxy->default_ms > timeout.ms;
    const std::uint32_t limit_ms = own_counts       ? own_limit->highest_ms
                                   : told_counts    ? *told_ms
                                   : default_counts ? proxy->default_ms
                                                    : 0;

    Remedy raise{.end = Remedy::End::upstream, .settings = {}, .why = {}};
    const std::uint32_t raised_ms =
        rounded_up(limit_ms != 0 ? limit_ms + upstream_behind_ms
                                 : std::max(long_enough_ms, 2 * std::min(timeout.ms, most_reckoned_ms)));
    const auto add = [&](const IdleSetting& server, const std::vector<Present>& present) {
        raise.settings.push_back({.software = server.software,
                                  .text = written(server, raised_ms),
                                  .note = server.where,
                                  .present = present,
                                  .source = server.source});
    };
    if (const IdleSetting* server = ends.upstream.software; server == nullptr)
        for (const IdleSetting& one : server_settings().first(most_common_servers))
            add(one, {});
    else if (!server->setting.empty())
        add(*server, ends.upstream.present);
    if (ends.upstream.software != nullptr && ends.upstream.software->setting.empty())
        raise.why = ends.upstream.software->where;
    else if (own_counts)
        raise.why = fmt::format("{} closes its idle connections after {}", own, seconds(own_limit->highest_ms));
    else if (told_counts)
        raise.why = fmt::format("{} keeps idle connections for {}", proxy->software, seconds(limit_ms));
    else if (default_counts)
        raise.why = fmt::format("{} keeps idle connections for {}, unless it is told otherwise", proxy->software,
                                seconds(limit_ms));
    else
        raise.why = "nothing is known to limit this host's idle connections: the longer the upstream waits, the fewer "
                    "races are left";

    // A timer of less than two seconds leaves no room for a setting in whole ones. Timers are looked at early by a
    // hair.
    const std::uint32_t room_ms = timeout.lowest_ms + hair_ms;
    const std::uint32_t lowered_ms =
        room_ms >= 2 * proxy_ahead_ms ? (room_ms - proxy_ahead_ms) / second_ms * second_ms : 0;
    Remedy lower{.end = Remedy::End::proxy, .settings = {}, .why = {}};
    if (lowered_ms == 0) {
        lower.why = fmt::format("no limit there is worth it, for the upstream closes after {}", seconds(timeout.ms));
    } else if (told_ms && *told_ms != 0 && *told_ms <= lowered_ms) {
        lower.why = fmt::format("{} is told to close them after {} already{} another process keeps these, and must "
                                "close them after {} at most",
                                proxy->software, seconds(*told_ms),
                                proxy->looked_at_on_use ? ", which does nothing under its prefork MPM, or" : ":",
                                seconds(lowered_ms));
    } else if (proxy == nullptr) {
        lower.why =
            fmt::format("whatever keeps these connections on this host must close them after {} of rest, before "
                        "the upstream does",
                        seconds(lowered_ms));
    } else {
        if (!proxy->beside.empty())
            lower.settings.push_back({.software = proxy->software,
                                      .text = std::string(proxy->beside),
                                      .note = proxy->beside_where,
                                      .present = ends.proxy.present,
                                      .source = proxy->source});
        lower.settings.push_back({.software = proxy->software,
                                  .text = written(*proxy, lowered_ms),
                                  .note = proxy->where,
                                  .present = proxy->beside.empty() ? ends.proxy.present : std::vector<Present>{},
                                  .source = proxy->source});
        lower.why = fmt::format("a second before the upstream, which closes after {}", seconds(timeout.ms));
    }
    // Where nothing limits the proxy, and something could without a price, raising the upstream's leaves a race;
    // likewise where the upstream has nothing to raise.
    const bool lower_is_better =
        !lower.settings.empty() && (raise.settings.empty() || (limit_ms == 0 && proxy->beside.empty()));
    std::vector<Remedy> ways;
    ways.push_back(std::move(lower_is_better ? lower : raise));
    ways.push_back(std::move(lower_is_better ? raise : lower));
    return ways;
}

} // namespace finrace
