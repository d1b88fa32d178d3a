// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/sentences.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/cause.h"
#include "core/classify.h"
#include "core/reason.h"
#include "core/units.h"
#include "sink/clock.h"
#include "sink/facts.h"
#include "sink/text.h"

namespace finrace {

namespace {

std::string endpoint(const UpstreamKey& key)
{
    return endpoint_text(key.address.data(), key.port, key.family);
}

/// "taken at the end of the host that opened the connections (10.0.0.1), sure"
std::string taken_text(const CaptureSeen& capture)
{
    const std::string host = capture.host.empty() ? "" : fmt::format(" ({})", capture.host);
    const char* certainty = capture.sure ? "sure" : "likely";
    switch (capture.place) {
    case TakenAt::client:
        return fmt::format("taken at the end that opened the connections{}, {}", host, certainty);
    case TakenAt::server:
        return fmt::format("taken at the upstream's end{}, {}", host, certainty);
    case TakenAt::both:
        return fmt::format("taken on a host that has both ends, {}", certainty);
    case TakenAt::between:
        return fmt::format("taken between the two ends, {}", certainty);
    case TakenAt::mixed:
        return fmt::format("taken at the end that opened {} and accepted {} connections{}, {}", capture.at_client,
                           capture.at_server, host, certainty);
    case TakenAt::unknown:
        break;
    }
    return "where it was taken does not show";
}

/// In two digits: more are not known.
std::string two_digits(double value)
{
    if (value < 10)
        return fmt::format("{:.2g}", value);
    const double step = std::pow(10, std::floor(std::log10(value)) - 1);
    return fmt::format("{:.0f}", std::round(value / step) * step);
}

std::string range_text(const Exposure::Range& range, double least)
{
    const std::string low = two_digits(range.low);
    const std::string high = two_digits(range.high);
    return range.high < least ? fmt::format("less than {}", least)
           : low == high      ? "about " + low
                              : fmt::format("{} to {}", low, high);
}

/// "Races to be expected: 9 to 40 a day, if …"
std::string expected_text(const Exposure& exposure)
{
    const std::string late = fmt::format("{:.0f} after more than half that time", exposure.late_reuses);
    const auto expected = exposure.expected();
    if (!expected)
        return fmt::format("Races are to be expected; how often can't be reckoned from so few requests ({})", late);
    return fmt::format("Races to be expected: {} a day, {} % of the requests, if these go on as they did ({})",
                       range_text(expected->races_a_day, 0.1),
                       range_text({.low = 100 * expected->share.low, .high = 100 * expected->share.high}, 0.001), late);
}

/// Who has this end of its connections.
std::string owner_text(const Pool& pool)
{
    return !pool.process.empty() ? printable(pool.process) : pool.hosts.empty() ? "this host" : "the proxy";
}

std::string own_text(const Pool& pool)
{
    const std::string who = owner_text(pool);
    if (const auto own = pool.upstream.own_idle_limit.timeout();
        own && own->highest_ms >= pool.upstream.longest_reused_idle_ms)
        return fmt::format("{} closes them after {}", who, duration_text(own->ms));
    if (const auto told_ms = pool.ends.proxy.limit_ms())
        return *told_ms == 0 ? fmt::format("{} would keep them without end", who)
                             : fmt::format("{} would close them after {}", who, duration_text(*told_ms));
    if (pool.upstream.longest_reused_idle_ms > 0)
        return fmt::format("{} has used them again after up to {}", who,
                           duration_text(pool.upstream.longest_reused_idle_ms));
    return fmt::format("{} has used none of them again so far", who);
}

} // namespace

std::span<const Word> report_words()
{
    static constexpr Word words[] = {
        {"unclassified",
         "A request got no answer, or a connection ended in mid-exchange, and what TCP showed fits none of "
         "the causes: above all this host's own close of a request that the upstream had (a proxy's "
         "timeout, a client that left). A wrong name would be worse than none; it is counted, by "
         "upstream, in finrace.upstream."},
        {"exposed", "Of a pool: the upstream closes idle connections that this host would use again. Sooner or later a "
                    "request meets such a close: a keepalive_race."},
        {"kept_clear", "Of a pool: the upstream closes idle connections first, but of many requests after a long rest "
                       "none came near its timer. A limit that is looked at on use (Apache httpd's ttl) does that, or "
                       "chance."},
        {"safe", "Of a pool: this host closes its idle connections before the upstream does."},
        {"not_reused", "Of a pool: each connection carries one request, so that no idle close can meet another."},
        {"unknown", "Of a pool: what was seen does not tell which end closes idle connections first. Of a reason: "
                    "nothing that was seen tells why the upstream closed."},
        {"proven", "The evidence excludes any other cause."},
        {"likely", "Another cause would need a coincidence."},
        {"possible", "Another cause fits nearly as well; what would decide it has not been learned yet."},
        {"incomplete", "The connection was older than finrace, or an event of it was lost, where that matters."},
    };
    return words;
}

std::string counted(std::uint64_t count, std::string_view one)
{
    return fmt::format("{} {}{}", count, one, count == 1 ? "" : "s");
}

std::string duration_text(std::uint64_t ms)
{
    if (ms < 1000)
        return fmt::format("{} ms", ms);
    if (ms < 600'000 && ms % 1000 == 0)
        return fmt::format("{} s", ms / 1000);
    if (ms < 600'000)
        return fmt::format("{:.2f} s", static_cast<double>(ms) / 1e3);
    return fmt::format("{:.0f} min", static_cast<double>(ms) / 60e3);
}

Places::Places(const Diagnosis& diagnosis)
{
    for (const Pool* pool : diagnosis.pools()) {
        note(pool->where);
        if (!pool->hosts.empty())
            hosts_.emplace(pool->where, pool->hosts.begin()->first);
    }
    for (const Finding* finding : diagnosis.findings()) {
        note(finding->where);
        if (!finding->hosts.empty())
            hosts_.emplace(finding->where, finding->hosts.begin()->first);
    }
}

std::string Places::name(const UpstreamKey& key) const
{
    const std::string name = endpoint(key);
    if (const auto host = hosts_.find(key); host != hosts_.end() && key.is_loopback())
        return fmt::format("{} on {}", name, host->second);
    const auto found = networks_.find(name);
    return found != networks_.end() && found->second.size() > 1
               ? fmt::format("{} (network namespace {})", name, key.netns)
               : name;
}

void Places::note(const UpstreamKey& key)
{
    networks_[endpoint(key)].insert(key.netns);
}

bool nothing_matched(const Diagnosis& diagnosis, const Watched& watched)
{
    return !watched.filter.empty() && diagnosis.pools().empty() && diagnosis.findings().empty();
}

std::string subject_text(const Diagnosis& diagnosis, const Watched& watched)
{
    const std::string duration =
        watched.fleet ? "" // its beginning is told
                      : fmt::format("{}{:.1f} s, ",
                                    diagnosis.runs() > 1 ? fmt::format("{} runs, together ", diagnosis.runs()) : "",
                                    static_cast<double>(watched.observed_ns) / 1e9);
    return fmt::format(
        "finrace{}: {}, {}{}, {} on {}{}", watched.host_name.empty() ? "" : " on " + printable(watched.host_name),
        watched.source, duration, counted(diagnosis.pools().size(), "upstream"),
        counted(diagnosis.requests(), "request"), counted(diagnosis.connections(), "connection"),
        diagnosis.open_requests() > 0 ? fmt::format(" that ended, {} on those still open", diagnosis.open_requests())
        : diagnosis.open() > 0        ? fmt::format(" and {} still open", diagnosis.open())
                                      : "");
}

namespace {

/// What is to be done again, to see more.
std::string_view to_see(const Watched& watched)
{
    return !watched.captures.empty() ? "capture" : watched.stored ? "record" : "watch";
}

/// "Seen: 10.0.0.5:8000 (nginx, 50 connections), and 3 more upstreams."
std::string elsewhere_text(const Watched& watched)
{
    constexpr std::size_t most = 5;
    std::vector<std::string> parts;
    for (const Elsewhere& one : watched.elsewhere) {
        if (parts.size() == most) {
            parts.push_back("and " + counted(watched.elsewhere.size() - most, "more upstream"));
            break;
        }
        parts.push_back(fmt::format("{} ({}{})", endpoint(one.where),
                                    one.process.empty() ? "" : printable(one.process) + ", ",
                                    counted(one.connections, "connection")));
    }
    return fmt::format("Seen: {}.", fmt::join(parts, ", "));
}

/// What the captures together do not have.
CaptureSeen not_captured(const Watched& watched)
{
    CaptureSeen all;
    for (const CaptureSeen& capture : watched.captures) {
        all.one_direction += capture.one_direction;
        all.missing += capture.missing;
        all.unreadable += capture.unreadable;
    }
    return all;
}

std::string lost_in_captures_text(const Watched& watched)
{
    const CaptureSeen gaps = not_captured(watched);
    std::vector<std::string> parts;
    if (gaps.one_direction > 0)
        parts.push_back(counted(gaps.one_direction, "connection") + " in one direction alone");
    if (gaps.missing > 0)
        parts.push_back(counted(gaps.missing, "gap") + " in what was acknowledged");
    if (gaps.unreadable > 0)
        parts.push_back(counted(gaps.unreadable, "segment") + " without a whole header");
    if (const std::uint64_t told = gaps.one_direction + gaps.missing + gaps.unreadable; watched.lost > told)
        parts.push_back(fmt::format("{} more cut off, or without room", watched.lost - told));
    return fmt::format("Not all was captured: {}. The counts below are too low.", fmt::join(parts, ", "));
}

/// How to lose less.
std::string lost_remedy(const Watched& watched)
{
    if (watched.captures.empty()) {
        std::vector<std::string> room;
        if (watched.lost > watched.table_full + watched.program_skipped)
            room.emplace_back("--ring-bytes 64M");
        if (watched.table_full > 0)
            room.emplace_back("--max-connections");
        return fmt::format(
            "{}{} again{}", watched.stored ? "name all of the recording's files, or " : "", to_see(watched),
            room.empty() ? ": the kernel left out a run of one of finrace's programs, which no setting changes"
                         : fmt::format(", with more room ({})", fmt::join(room, ", ")));
    }
    const CaptureSeen gaps = not_captured(watched);
    std::vector<std::string> ways;
    if (gaps.one_direction > 0)
        ways.emplace_back("both directions (tcpdump -i any)");
    if (gaps.missing > 0)
        ways.emplace_back("with a larger buffer (-B 16384)");
    if (gaps.unreadable > 0)
        ways.emplace_back("more of each packet (-s 128)");
    return ways.empty() ? "capture again, to the end" : fmt::format("capture {}", fmt::join(ways, ", "));
}

/// "10.0.0.2:8000 and 2 more upstreams": those of which something is true; empty if there is none.
std::string first_of(const Diagnosis& diagnosis, const Places& places, bool (*is_one)(const Pool&))
{
    std::string text;
    std::uint64_t more = 0;
    for (const Pool* pool : diagnosis.pools()) {
        if (!is_one(*pool))
            continue;
        if (text.empty())
            text = name_text(places, *pool);
        else
            ++more;
    }
    return more == 0 ? text : fmt::format("{} and {}", text, counted(more, "more upstream"));
}

/// What was changed after the process that goes by it had begun: whose, and what.
std::vector<std::pair<std::string_view, const Present*>> pending_of(const Pool& pool)
{
    std::vector<std::pair<std::string_view, const Present*>> pending;
    for (const End* end : {&pool.ends.proxy, &pool.ends.upstream})
        for (const Present& present : end->present)
            if (present.pending)
                pending.emplace_back(end->software->software, &present);
    return pending;
}

/// What was not seen, and what to do: of several reasons the one that hides the most.
std::string inconclusive_text(const Diagnosis& diagnosis, const Watched& watched, const Places& places)
{
    if (watched.server_side_only)
        return "no server's failure was seen, and what healthy ones do is not followed; leave out --side server to "
               "judge what this host opens";
    if (watched.fleet && watched.fleet->hosts.empty())
        return "no host has told anything since then; see that finrace runs there, and that its records arrive";
    if (watched.fleet && !watched.fleet->all_tell())
        return "nothing failed that was told, but not every host tells; see that finrace runs there, and that its "
               "records arrive";
    if (watched.fleet && watched.lost > 0)
        return fmt::format(
            "nothing failed that was told, but {} were lost or dropped on the hosts; their finrace.health "
            "records tell where",
            counted(watched.lost, "event or record"));
    if (nothing_matched(diagnosis, watched))
        return fmt::format("no connection {}matched {}{}", watched.adopted_open > 0 ? "that began or ended " : "",
                           printable(fmt::format("{}", fmt::join(watched.filter, " "))),
                           watched.elsewhere.empty()
                               ? fmt::format(", and no other was seen; {} while there is traffic", to_see(watched))
                               : "; choose among those that were seen, or leave that out");
    if (watched.lost > 0)
        return fmt::format("nothing failed that was seen, but {}; {}",
                           !watched.captures.empty() ? "not all was captured"
                           : watched.lost == 1       ? "1 event was lost"
                                                     : fmt::format("{} events were lost", watched.lost),
                           lost_remedy(watched));
    if (diagnosis.requests() + diagnosis.open_requests() == 0) {
        if (diagnosis.connections() == 0 && (!diagnosis.pools().empty() || watched.adopted_open > 0))
            return fmt::format("no connection ended, which is when its requests are known; {} for longer",
                               to_see(watched));
        return fmt::format("no request was seen; {} for longer, or while there is traffic", to_see(watched));
    }
    if (watched.missing_hooks > 0)
        return fmt::format("nothing failed that was seen, but {} could not be attached; finrace doctor tells what goes "
                           "unseen, and what to change",
                           counted(watched.missing_hooks, "hook"));
    if (const std::uint64_t count = diagnosis.unclassified(); count > 0)
        return fmt::format("{} ended in mid-exchange without a cause that can be named; finrace explain unclassified "
                           "tells what that may be",
                           counted(count, "connection"));
    for (const Pool* pool : diagnosis.pools())
        if (const auto pending = pending_of(*pool); pool->leaves_open() && !pending.empty())
            return printable(
                fmt::format("nothing failed, but what {} goes by is not known, for {} was changed after it "
                            "had begun; reload it, and {} again",
                            pending.front().first, pending.front().second->place, to_see(watched)));
    if (const std::string open = first_of(diagnosis, places, [](const Pool& pool) { return pool.leaves_open(); });
        !open.empty())
        return fmt::format(
            "nothing failed, but whether connections to {} can race has not shown; {} for longer than they rest", open,
            to_see(watched));
    return fmt::format("nothing failed, but of {} nothing is known yet; {} for longer, or choose upstreams "
                       "(--upstream)",
                       counted(watched.adopted_open, "older connection"), to_see(watched));
}

} // namespace

std::string conclusion(const Diagnosis& diagnosis, const Watched& watched, const Places& places)
{
    switch (diagnosis.state(watched.is_partial())) {
    case Diagnosis::State::healthy:
        return "Healthy: nothing failed, and no pool can race with its upstream.";
    case Diagnosis::State::exposed:
        return fmt::format(
            "Nothing failed so far, but a request will meet the idle close of {}: what to change is below.",
            first_of(diagnosis, places, [](const Pool& pool) { return pool.exposure.state == PoolState::exposed; }));
    case Diagnosis::State::findings: {
        const std::vector<const Finding*> findings = diagnosis.findings();
        const Finding& worst = *findings.front();
        return fmt::format("{}: {}{} at {}: {}.", counted(findings.size(), "finding"),
                           findings.size() > 1 ? "the worst is " : "", to_string(worst.cause), places.name(worst.where),
                           affected_text(worst));
    }
    case Diagnosis::State::inconclusive:
        return fmt::format("Inconclusive: {}.", inconclusive_text(diagnosis, watched, places));
    }
    return {};
}

std::string lost_text(const Watched& watched)
{
    if (watched.lost == 0)
        return {};
    if (!watched.captures.empty())
        return lost_in_captures_text(watched);
    return fmt::format("{} not seen, or lost: the counts below are too low.",
                       watched.lost == 1 ? "1 event was" : fmt::format("{} events were", watched.lost));
}

namespace {

/// Where most of them were. `all` is not zero.
std::string most_unclassified(const Diagnosis& diagnosis, std::uint64_t all)
{
    const std::vector<const Pool*> pools = diagnosis.pools();
    const Pool* most = *std::max_element(pools.begin(), pools.end(), [](const Pool* one, const Pool* other) {
        return one->unclassified < other->unclassified;
    });
    const std::string where = name_text(Places(diagnosis), *most);
    return most->unclassified == all ? fmt::format("at {}", where)
                                     : fmt::format("{} of them at {}", most->unclassified, where);
}

} // namespace

std::vector<std::string> caveats(const Diagnosis& diagnosis, const Watched& watched)
{
    std::vector<std::string> all;
    if (nothing_matched(diagnosis, watched) && !watched.elsewhere.empty())
        all.push_back(elsewhere_text(watched));
    const auto who_do_not_tell = [&](const std::vector<std::string>& hosts, std::string_view what) {
        constexpr std::size_t most = 10;
        if (hosts.empty())
            return;
        const std::vector<std::string> first(hosts.begin(),
                                             hosts.begin() + static_cast<std::ptrdiff_t>(std::min(hosts.size(), most)));
        all.push_back(fmt::format("{} {}: {}{}. What happens there is not known.",
                                  hosts.size() == 1 ? "1 host has" : fmt::format("{} hosts have", hosts.size()), what,
                                  fmt::join(first, ", "), hosts.size() > most ? ", ..." : ""));
    };
    if (watched.fleet) {
        who_do_not_tell(watched.fleet->silent, "stopped telling");
        who_do_not_tell(watched.fleet->ended, "no finrace any more, which was told to end");
    }
    for (const CaptureSeen& capture : watched.captures)
        all.push_back(fmt::format("{}: {}{}.", capture.file, taken_text(capture),
                                  capture.guessed == 0
                                      ? ""
                                      : fmt::format("; {} without a handshake, whose client is guessed",
                                                    counted(capture.guessed, "connection"))));
    if (!watched.captures.empty())
        all.emplace_back(
            "A capture does not show processes, who closed a socket, what lay unread, retries, nor what the "
            "clients behind a proxy got.");
    if (watched.stored && watched.captures.empty())
        all.emplace_back(
            "What the two ends have been told is in no recording: on the host itself finrace diagnose reads it.");
    if (watched.adopted_open > 0 && !watched.chosen)
        all.push_back(fmt::format(
            "{} older than {}, and {} not ended: nothing is known of {} yet.",
            watched.adopted_open == 1 ? "1 connection is" : fmt::format("{} connections are", watched.adopted_open),
            watched.captures.empty() ? "finrace, on this host" : "the capture",
            watched.adopted_open == 1 ? "has" : "have", watched.adopted_open == 1 ? "it" : "them"));
    if (watched.missing_hooks > 0)
        all.push_back(fmt::format("{} could not be attached: finrace doctor tells what can't be seen without.",
                                  counted(watched.missing_hooks, "hook")));
    if (const std::uint64_t count = diagnosis.unclassified(); count > 0)
        all.push_back(fmt::format("{} in mid-exchange without a cause that can be named (finrace explain "
                                  "unclassified), {}.",
                                  count == 1 ? "1 connection ended" : fmt::format("{} connections ended", count),
                                  most_unclassified(diagnosis, count)));
    return all;
}

std::string affected_text(const Finding& finding)
{
    switch (finding.cause) {
    case Cause::connect_refused:
    case Cause::connect_timeout:
    case Cause::connect_unreachable:
    case Cause::handshake_failed:
        return fmt::format("{} failed", counted(finding.affected, "attempt"));
    case Cause::accept_overflow:
        return fmt::format("{} turned away", counted(finding.affected, "connection"));
    case Cause::upstream_benched:
        return fmt::format("{} answered without an upstream", counted(finding.affected, "request"));
    case Cause::client_abort:
        return fmt::format("{} left before the answer", counted(finding.affected, "client"));
    default:
        return fmt::format("{} died", counted(finding.affected, "request"));
    }
}

std::string why_text(const Finding& finding)
{
    std::vector<std::string> parts;
    for (const auto& [certainty, count] : finding.certainties)
        parts.push_back(fmt::format("{} {}", count, to_string(certainty)));
    std::string text = fmt::format("{}: {}", text_of(finding.cause).title, fmt::join(parts, ", "));
    if (finding.incomplete > 0)
        text += fmt::format(" ({} incomplete: older than finrace, or part of it was lost)", finding.incomplete);
    parts.clear();
    std::uint64_t known = 0;
    for (const auto& [reason, count] : finding.reasons) {
        parts.push_back(fmt::format("{} {}", count, to_string(reason)));
        known += count;
    }
    if (!parts.empty() && known < finding.verdicts)
        parts.push_back(fmt::format("{} not known when it came", finding.verdicts - known));
    if (!parts.empty())
        text += fmt::format(". Why the upstream closed: {}", fmt::join(parts, ", "));
    return text + ".";
}

std::string clients_text(const Finding& finding, const Watched& watched)
{
    if (!watched.captures.empty())
        return "What clients got is not known: a capture does not show it.";
    if (!watched.tells_outcomes)
        return "What clients got is not known: backend cgroup does not see it.";
    std::vector<std::string> parts;
    std::uint64_t known = finding.clients_left;
    for (const auto& [status, count] : finding.answers) {
        parts.push_back(fmt::format("{} × {}", count, status));
        known += count;
    }
    if (finding.clients_left > 0)
        parts.push_back(fmt::format("{} closed on without an answer, or gone", finding.clients_left));
    if (known < finding.verdicts)
        parts.push_back(fmt::format("{} not known", finding.verdicts - known));
    return fmt::format("Clients got: {}.{}", fmt::join(parts, ", "),
                       finding.hidden > 0 ? fmt::format(" A retry hid {}.", finding.hidden) : "");
}

std::string waits_text(const Finding& finding)
{
    if (!finding.waits || finding.verdicts == 1)
        return {};
    const Finding::Waits& waits = *finding.waits;
    const std::string_view whose = is_by_upstream(finding.cause)          ? "a limit of the upstream's"
                                   : finding.cause == Cause::client_abort ? "the clients' patience"
                                                                          : "this host's patience";
    if (const auto timer = waits.timer())
        return fmt::format("{} lay between most requests and their ends (spread {} ms): {}.", duration_text(timer->ms),
                           timer->spread_ms(), whose);
    const std::string lowest = duration_text(waits.lowest_ms);
    const std::string highest = duration_text(waits.highest_ms);
    return fmt::format("Between the requests and their ends lay {}.",
                       lowest == highest ? lowest : fmt::format("{} to {}", lowest, highest));
}

namespace {

/// Whether a server's limit of a worker's silence is what these died of: each of them, or the longest, which blocked
/// the others. Empty if not.
std::string_view explained_by(const Present& limit, const Finding& finding)
{
    const auto fits = [&limit](std::uint64_t ms) { return ms >= limit.ms && ms <= limit.ms + worker_limit_late_ms; };
    if (limit.ms == 0 || !finding.waits) // 0 is no limit
        return {};
    const auto timer = finding.waits->timer();
    if ((fits(finding.waits->lowest_ms) && fits(finding.waits->highest_ms)) ||
        (timer && fits(timer->lowest_ms) && fits(timer->highest_ms)))
        return "; these requests had taken about as long when they died. Raise it above what the slowest handler is "
               "meant to take, or make that faster";
    // Its worker had last been heard of a little before it was taken up.
    if (fits(finding.waits->highest_ms + limit.ms / 8))
        return "; the longest of these requests had taken about as long when it died: where a worker carries several "
               "at once, one that blocks its event loop is the end of all. Let that handler wait without blocking; a "
               "longer limit would only stall them for longer";
    return {};
}

} // namespace

namespace {

/// What is special about it here.
std::vector<std::string> own_hints(const Diagnosis& diagnosis, const Watched& watched, const Finding& finding)
{
    std::vector<std::string> all;
    const Pool* pool = diagnosis.pool(finding.where);
    if (pool == nullptr || finding.server_side)
        return all;
    const End& server = pool->ends.upstream;
    const bool ends_requests = is_by_upstream(finding.cause);
    if (ends_requests && server.software != nullptr) {
        if (!server.software->dies_of.empty())
            all.push_back(fmt::format("{} stands there: {}.", server.software->software, server.software->dies_of));
        for (const Present& limit : server.worker_limit)
            all.push_back(fmt::format("{}'s {}: {}{}.", server.software->software, worker_limit_flag,
                                      present_text(limit), explained_by(limit, finding)));
    }
    if (!server.recycling.empty() &&
        (ends_requests || finding.cause == Cause::connect_refused || finding.reasons.count(Reason::restart) != 0))
        all.push_back(fmt::format("{} ends a process after so many requests, {}: until another one accepts, requests "
                                  "fail. Have several that take turns, or none end.",
                                  server.software->software, server.recycling));
    if (ends_requests && finding.most_at_once > 1)
        all.push_back(
            fmt::format("Up to {} of them died within 100 ms of each other: that is a process that ended with "
                        "all that it had under way, rather than {} handlers.",
                        finding.most_at_once, finding.most_at_once));
    if (const auto listens = server.listens; finding.cause == Cause::connect_refused && listens)
        all.push_back(*listens ? fmt::format("{} listens there now: it was away for a while, or came late.",
                                             server.software != nullptr ? server.software->software : "Somebody")
                               : "Nobody on this host listens there now.");
    if (server.listens.value_or(false) && watched.turned_away > 0 &&
        (finding.cause == Cause::connect_timeout || finding.cause == Cause::accept_stalled))
        all.push_back(
            fmt::format("{} listens on this host, and meanwhile {} here were turned away because a listener's "
                        "accept queue was full (ListenOverflows): it does not accept for a while (a blocked "
                        "event loop, no free worker), or its backlog is too short. A longer backlog lets clients "
                        "wait instead of fail, no more, if it is the former.",
                        server.software != nullptr ? server.software->software : "The upstream",
                        counted(watched.turned_away, "connection")));
    return all;
}

/// What died with it of another cause.
std::vector<std::string> together_hints(const Finding& finding)
{
    std::vector<std::string> all;
    for (const auto& [cause, together] : finding.together)
        all.push_back(fmt::format(
            "{} died within 100 ms of one of these as {}: such are one failure, not two. A process that ends closes "
            "the connections whose requests it has read (upstream_closed) and resets those whose requests lie "
            "unread (upstream_reset) or that it was answering (response_cut).",
            together.times == 1 ? "Once, a request to this upstream"
                                : fmt::format("{} times, requests to this upstream", together.times),
            to_string(cause)));
    return all;
}

} // namespace

std::vector<std::string> hints(const Diagnosis& diagnosis, const Watched& watched, const Finding& finding)
{
    std::vector<std::string> all = own_hints(diagnosis, watched, finding);
    for (const auto& [reason, count] : finding.reasons)
        if (const ReasonText* text = text_of_reason(to_string(reason)); text != nullptr && reason != Reason::idle_timer)
            all.push_back(fmt::format("{}: {}", to_string(reason), text->remedy));
    // The text on a race is about timers.
    if (!is_race(finding.cause) || (finding.is_of_timer() && pool_to_set(diagnosis, finding) == nullptr))
        all.emplace_back(text_of(finding.cause).remedy);
    for (std::string& one : together_hints(finding))
        all.push_back(std::move(one));
    return all;
}

namespace {

/// "proxy-1 (12), proxy-2 (3) and 4 more", the most first.
std::string ranked(const std::map<std::string, std::uint64_t>& counts)
{
    constexpr std::size_t most = 5;
    std::vector<std::pair<std::string, std::uint64_t>> sorted(counts.begin(), counts.end());
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const auto& one, const auto& other) { return one.second > other.second; });
    std::vector<std::string> parts;
    for (const auto& [name, count] : sorted) {
        if (parts.size() == most)
            break;
        parts.push_back(fmt::format("{} ({})", name, count));
    }
    const std::string text = fmt::format("{}", fmt::join(parts, ", "));
    return sorted.size() > most ? fmt::format("{} and {} more", text, sorted.size() - most) : text;
}

} // namespace

std::string hosts_text(const Finding& finding)
{
    if (finding.hosts.empty())
        return {};
    const std::string text = fmt::format(
        "{}: {}; since {}.", finding.hosts.size() == 1 ? "One host" : fmt::format("{} hosts", finding.hosts.size()),
        ranked(finding.hosts), WallClock(0).day_and_time(finding.first_ns));
    return finding.upstream_hosts.empty() ? text
                                          : fmt::format("{} The upstream's own host tells of the same connections: {}.",
                                                        text, ranked(finding.upstream_hosts));
}

std::string times_text(const Finding& finding)
{
    const WallClock real(0);
    if (finding.verdicts == 1)
        return fmt::format("At {}:", real.time_of_day(finding.first_ns));
    std::vector<std::string> times;
    for (const std::uint64_t at_ns : finding.times_ns)
        times.push_back(real.time_of_day(at_ns));
    if (finding.verdicts == times.size())
        return fmt::format("At {}. The most telling one:", fmt::join(times, ", "));
    const auto apart = finding.gaps.timeout();
    return fmt::format(
        "At {}, and {} more until {}{}. The most telling one:", fmt::join(times, ", "), finding.verdicts - times.size(),
        real.time_of_day(finding.last_ns),
        finding.bursts < 2 ? ""
        : finding.bursts == 2
            ? fmt::format(", in 2 bursts, {} apart", duration_text((finding.burst_ns - finding.first_ns) / ns_per_ms))
        : apart ? fmt::format(", in {} bursts, {} apart as a rule", finding.bursts, duration_text(apart->ms))
                : fmt::format(", in {} bursts", finding.bursts));
}

Sighting sighting_of(const Diagnosis& diagnosis, const Finding& finding)
{
    const Pool* pool = diagnosis.pool(finding.where);
    return {.judged = finding.instance.e,
            .last = finding.instance.last,
            .verdict = finding.instance.verdict,
            .outcome = finding.instance.outcome,
            .idle_timeout =
                pool != nullptr && !finding.server_side ? pool->upstream.idle_timeout.timeout() : std::nullopt,
            .process_name = finding.instance.process};
}

const Pool* pool_to_set(const Diagnosis& diagnosis, const Finding& finding)
{
    if (!finding.is_of_timer())
        return nullptr;
    const Pool* pool = diagnosis.pool(finding.where);
    return pool != nullptr && pool->timeout() ? pool : nullptr;
}

std::vector<Remedy> remedies_of(const Pool& pool)
{
    return remedies(*pool.timeout(), pool.upstream.own_idle_limit.timeout(), pool.ends,
                    pool.hosts.empty() ? "this host" : "the proxy");
}

std::string timeout_text(const Places& places, const Pool& pool)
{
    const IdleTimeout timeout = *pool.timeout();
    if (timeout.samples == 0 && pool.upstream.idle_timeout.timeout())
        return fmt::format("{} closes connections that have rested for {}, as --idle-timeout says",
                           places.name(pool.where), duration_text(timeout.ms));
    if (timeout.samples == 0) {
        const std::vector<Present>& present = pool.ends.upstream.present;
        const bool by_default = present.front().text.empty();
        return fmt::format("{} closes connections that have rested for {}, {}", places.name(pool.where),
                           duration_text(timeout.ms),
                           by_default ? fmt::format("{}'s default", pool.ends.upstream.software->software)
                                      : fmt::format("as {} is told", pool.ends.upstream.software->software));
    }
    return fmt::format("{} closes connections that have rested for {} ({}, within {} ms)", places.name(pool.where),
                       duration_text(timeout.ms), counted(timeout.samples, "sample"), timeout.spread_ms());
}

std::string limits_text(const Places& places, const Pool& pool)
{
    return fmt::format("{}; {}.", timeout_text(places, pool), own_text(pool));
}

std::string name_text(const Places& places, const Pool& pool)
{
    return pool.other ? "all others" : places.name(pool.where);
}

std::string traffic_text(const Pool& pool)
{
    std::string text =
        fmt::format("{} on {}", counted(pool.requests, "request"), counted(pool.connections, "connection"));
    if (pool.now.open > 0)
        text += fmt::format(" that ended, {} on {} still open", pool.now.requests, pool.now.open);
    else if (pool.open > 0)
        text += fmt::format(", {} more still open", pool.open);
    return pool.process.empty() ? text : fmt::format("{}, by {}", text, printable(pool.process));
}

namespace {

/// Why no connection of it is there when the upstream closes.
std::string safe_text(const Places& places, const Pool& pool)
{
    if (!pool.exposure.safe_as_told)
        return fmt::format("{}, before the upstream does", own_text(pool));
    const std::uint32_t longest_ms = std::max(pool.upstream.longest_reused_idle_ms, pool.upstream.longest_kept_ms);
    const auto told_ms = pool.ends.proxy.limit_ms();
    if (!told_ms || *told_ms == 0)
        return fmt::format("{}; {} let none of {} rest for longer than {} before it closed it",
                           timeout_text(places, pool), pool.process.empty() ? "this host" : printable(pool.process),
                           counted(pool.upstream.kept_idle, "connection"), duration_text(longest_ms));
    if (pool.ends.proxy.software->looked_at_on_use)
        return fmt::format("{}; {} uses none again after {}, as it is told", timeout_text(places, pool),
                           pool.ends.proxy.software->software, duration_text(*told_ms));
    return fmt::format("{}; {}", timeout_text(places, pool), own_text(pool));
}

/// Of an upstream whose idle timeout has not shown, though races have.
std::string closes_first_text(const Pool& pool)
{
    const std::string races = counted(pool.races, "race");
    for (const auto& [reason, count] : pool.race_reasons)
        if (const ReasonText* text = text_of_reason(to_string(reason));
            text != nullptr && reason != Reason::idle_timer && 2 * count > pool.races)
            return fmt::format("The upstream closes first, as {} show, and by no idle timer that has shown: {}.", races,
                               text->title);
    return fmt::format("The upstream closes first, as {} show; after how long a rest has not shown.", races);
}

std::vector<std::string> state_text(const Places& places, const Pool& pool)
{
    switch (pool.exposure.state) {
    case PoolState::exposed:
        if (pool.requests == 0)
            return {limits_text(places, pool),
                    "How often a request will meet that is known when connections that carried some have ended."};
        return {limits_text(places, pool),
                fmt::format("{}. One is lost if it comes within {:.1f} ms of the timer, or before its process has seen "
                            "the close. Races seen: {}.",
                            expected_text(pool.exposure), pool.exposure.window_ms, pool.races)};
    case PoolState::kept_clear:
        if (pool.exposure.told_timeout_ms)
            return {fmt::format("{}; of {} used again none had rested for half as long.", timeout_text(places, pool),
                                counted(pool.upstream.rests.count(), "connection"))};
        return {fmt::format("{}; of {:.0f} requests after more than half that time none came near it. A limit that is "
                            "looked at as a connection is used again (Apache httpd's ttl) looks like this, or chance.",
                            timeout_text(places, pool), pool.exposure.late_reuses)};
    case PoolState::safe:
        return {fmt::format("{}: no request can meet an idle close.", safe_text(places, pool))};
    case PoolState::not_reused:
        return {"Each connection carries one request: no request can meet an idle close."};
    case PoolState::unknown:
        if (pool.timeout())
            return {limits_text(places, pool)};
        if (pool.races > 0)
            return {closes_first_text(pool)};
        if (const auto own = pool.upstream.own_idle_limit.timeout())
            return {fmt::format("{}, {} so far; whether the upstream's timer is as short has not shown.",
                                own_text(pool), counted(own->samples, "time"))};
        return {"Who closes its idle connections, and after how long, has not shown."};
    }
    return {};
}

} // namespace

std::vector<std::string> pool_text(const Places& places, const Pool& pool)
{
    std::vector<std::string> all;
    if (const std::uint64_t count = pool.now.resting; count > 0)
        all.push_back(fmt::format("{} now, for up to {}.",
                                  count == 1 ? "1 connection rests" : fmt::format("{} connections rest", count),
                                  duration_text(pool.now.longest_rest_ms)));
    if (pool.hosts.size() > 1) {
        std::vector<std::string> exposed;
        for (const auto& [host, state] : pool.hosts)
            if (state == PoolState::exposed)
                exposed.push_back(host);
        constexpr std::size_t most = 5;
        const std::size_t more = exposed.size() - std::min(exposed.size(), most);
        exposed.resize(exposed.size() - more);
        all.push_back(fmt::format("{} use it{}.", counted(pool.hosts.size(), "host"),
                                  exposed.empty() ? ""
                                                  : fmt::format("; exposed: {}{}", fmt::join(exposed, ", "),
                                                                more > 0 ? fmt::format(" and {} more", more) : "")));
    }
    for (std::string& one : state_text(places, pool))
        all.push_back(std::move(one));
    for (const auto& [software, present] : pending_of(pool))
        all.push_back(fmt::format("{}: {}.", software, present_text(*present)));
    if (pool.exposure.safe_as_told)
        for (const End* end : {&pool.ends.upstream, &pool.ends.proxy})
            for (const Present& present : end->present)
                if (!present.pending)
                    all.push_back(fmt::format("{}: {}.", end->software->software, present_text(present)));
    const IdleSetting* server = pool.ends.upstream.software;
    const std::span<const IdleSetting> proxies = proxy_settings();
    if (server != nullptr && std::any_of(proxies.begin(), proxies.end(), [server](const IdleSetting& proxy) {
            return proxy.software == server->software;
        }))
        all.push_back(fmt::format("{} itself listens there. What it passes on goes to upstreams of its own: their "
                                  "ports, or --process, choose these.",
                                  server->software));
    return all;
}

std::string remedy_text(const Remedy& way, bool first)
{
    const bool raise = way.end == Remedy::End::upstream;
    if (way.settings.empty())
        return fmt::format("{}: {}.", raise ? "The upstream" : "The proxy", way.why);
    return fmt::format("{} ({}):",
                       raise   ? first ? "Raise the upstream's idle timeout" : "Or raise the upstream's idle timeout"
                       : first ? "Let the proxy close first"
                               : "Or let the proxy close first",
                       way.why);
}

std::string present_text(const Present& present)
{
    if (present.pending)
        return printable(
            fmt::format("{} ({}) was changed after the process had begun: reload it, unless that was done since",
                        present.place, present.text.empty() ? "no such setting" : present.text));
    std::string_view text = present.text;
    if (text.ends_with(';')) // nginx's: a sentence goes on behind it
        text.remove_suffix(1);
    const std::string now = !text.empty()     ? fmt::format("now {}", text)
                            : present.ms == 0 ? "now without a limit"
                                              : fmt::format("now its default, {}", duration_text(present.ms));
    return printable(fmt::format("{}: {}", now, present.place));
}

} // namespace finrace
