// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace diagnose: watches for a while, or reads what was recorded, and says what is wrong and what to change.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "cli/fleet.h"
#include "cli/live_loop.h"
#include "cli/options.h"
#include "cli/page_file.h"
#include "cli/passed_over.h"
#include "cli/stored_feed.h"
#include "cli/terminal.h"
#include "core/diagnosis.h"
#include "core/units.h"
#include "sink/facts.h"
#include "sink/html.h"
#include "sink/report.h"
#include "sink/text.h"
#include "source/host.h"

namespace finrace {

namespace {

constexpr int exit_findings = 1;
constexpr int exit_inconclusive = 3;
constexpr std::chrono::nanoseconds by_default = std::chrono::seconds(60);
constexpr std::size_t widest_report = 110;

struct DiagnoseOptions {
    WatchOptions watch;
    std::optional<std::chrono::nanoseconds> duration{};
    std::vector<std::string> files{};
    bool json = false;
    std::string page{};  ///< the file for it; empty if none is wanted
    std::string store{}; ///< where a fleet's records are; empty to watch this host
    std::chrono::nanoseconds since = std::chrono::hours(24);
};

class Doctor final : public Listener {
public:
    /// Of what was seen elsewhere, all that comes of it.
    Doctor(const Feed& feed, const Filter& filter) : feed_(feed), filter_(filter) {}

    /// `duration`: after which the loop ends.
    Doctor(const LiveLoop& feed, const Filter& filter, std::chrono::nanoseconds duration)
        : feed_(feed), live_(&feed), filter_(filter), duration_(duration), shows_progress_(::isatty(STDERR_FILENO) == 1)
    {
        newest_ns_ = started_ns_ = feed_.now_ns();
        overflows_before_ = listen_overflows();
    }

    void on_event(const event& e) override
    {
        tells_netns_ = tells_netns_ || (e.observed & OBSERVED_NETNS) != 0;
        diagnosis_.follow(e, e.kind == EVENT_CLOSED ? name_of(e) : std::string());
    }

    void on_verdict(const Judged& judged) override
    {
        ++verdicts_;
        diagnosis_.add(judged, name_of(judged.e), feed_.clock().offset_ns());
    }

    void on_passed_over(const event& e) override { passed_over_.add(e, feed_.names()); }

    bool on_tick() override
    {
        newest_ns_ = feed_.now_ns();
        if (started_ns_ == 0)
            started_ns_ = newest_ns_;
        if (shows_progress_)
            show_progress();
        return true;
    }

    void on_end() override
    {
        const std::uint64_t ran_ns = newest_ns_ - started_ns_;
        const SourceCounts counts = feed_.counts();
        if (live_ != nullptr) {
            const Host host = Host::now();
            const auto ends_of = [&](const UpstreamKey& where, const Owner& owner) { return host.ends(where, owner); };
            const auto [here, elsewhere] = pools_now();
            diagnosis_.end_run(feed_.intake().upstreams(), ran_ns, newest_ns_, ends_of, &here);
            note_elsewhere(elsewhere);
            if (const auto overflows = listen_overflows(); overflows && overflows_before_)
                watched_.turned_away = *overflows - std::min(*overflows, *overflows_before_);
        } else {
            diagnosis_.end_run(feed_.intake().upstreams(), ran_ns, newest_ns_);
            note_elsewhere({});
        }
        watched_.observed_ns += ran_ns;
        watched_.lost += counts.lost();
        watched_.table_full += counts.losses.by_place[LOSS_TABLE_FULL];
        watched_.program_skipped += counts.losses.by_place[LOSS_PROGRAM_SKIPPED];
        watched_.adopted_open +=
            counts.connections_adopted - std::min(counts.connections_adopted, feed_.intake().adopted_ended());
        watched_.tells_outcomes = watched_.tells_outcomes || feed_.facts().tells_outcomes;
        watched_.missing_hooks = std::max<std::uint64_t>(watched_.missing_hooks, feed_.facts().missing.size());
        started_ns_ = newest_ns_ = 0;
        if (shows_progress_)
            fmt::print(stderr, "\r\033[K");
    }

    [[nodiscard]] const Diagnosis& diagnosis() const { return diagnosis_; }
    [[nodiscard]] Watched watched() const
    {
        Watched all = watched_;
        for (const auto& [where, one] : elsewhere_)
            all.elsewhere.push_back(one);
        // What was meant, perhaps, comes first: the address with another port.
        const auto nearness = [&](const Elsewhere& one) {
            return std::pair(filter_.has_address(one.where), one.connections);
        };
        std::stable_sort(all.elsewhere.begin(), all.elsewhere.end(),
                         [&](const Elsewhere& a, const Elsewhere& b) { return nearness(a) > nearness(b); });
        return all;
    }

private:
    std::string name_of(const event& e) const { return process_name(e.connection, feed_.names()); }

    /// What the filter did not let through in this run; `pools` of it are there now.
    void note_elsewhere(const PoolsNow& pools)
    {
        std::map<UpstreamKey, Elsewhere> of_run;
        for (const auto& [where, passed] : passed_over_.take())
            of_run[where] = {
                .where = where, .process = passed.process, .connections = std::max(passed.begun, passed.ended)};
        for (const auto& [where, pool] : pools) {
            Elsewhere& one =
                of_run.try_emplace(where, Elsewhere{.where = where, .process = pool.owner.process}).first->second;
            one.connections = std::max({one.connections, pool.resting, pool.open});
        }
        for (auto& [where, one] : of_run) {
            Elsewhere& all =
                elsewhere_.try_emplace(where, Elsewhere{.where = where, .process = one.process}).first->second;
            all.connections += one.connections;
        }
    }

    /// The pools that there are now: those that the filter lets through, and the others.
    [[nodiscard]] std::pair<PoolsNow, PoolsNow> pools_now() const
    {
        std::pair<PoolsNow, PoolsNow> pools;
        if (filter_.side == Side::server)
            return pools;
        const auto pool_of = [&](UpstreamKey where, std::uint32_t pid, std::string_view comm) -> PoolNow& {
            const bool is_here = filter_.matches_opened(where, pid, comm, feed_.names());
            if (!tells_netns_)
                where.netns = 0;
            return (is_here ? pools.first : pools.second)[where];
        };
        for (const OpenSocket& one : open_sockets(live_->accounting(), true)) {
            const bool rests = one.sampled.used && !one.sampled.busy; // what nothing was asked of is no pool
            if (!rests && one.sampled.exchange == 0)
                continue;
            PoolNow& pool = pool_of(one.sampled.upstream, one.pid, one.process);
            if (rests) {
                ++pool.resting;
                pool.longest_rest_ms = std::max(pool.longest_rest_ms, one.sampled.rested_ms);
                if (pool.owner.pid == 0)
                    pool.owner = {.process = feed_.names().of(one.pid), .pid = one.pid};
            }
            if (one.sampled.exchange > 0) {
                ++pool.open;
                pool.requests += one.sampled.exchange;
            }
        }
        return pools;
    }

    void show_progress() const
    {
        std::uint64_t requests = 0;
        feed_.intake().upstreams().for_each(
            [&](const UpstreamKey*, const Upstream& upstream) { requests += upstream.counts.exchanges; });
        fmt::print(stderr, "\r\033[K{} of {} s: {} upstreams, {} requests, {} verdicts (Ctrl-C: report now)",
                   (newest_ns_ - started_ns_) / ns_per_second,
                   static_cast<std::uint64_t>(duration_.count()) / ns_per_second, feed_.intake().upstreams().size(),
                   requests, verdicts_);
        std::fflush(stderr);
    }

    const Feed& feed_;
    const LiveLoop* live_ = nullptr; ///< the same, if it is this host's
    const Filter& filter_;
    std::chrono::nanoseconds duration_{}; ///< for its progress
    bool shows_progress_ = false;
    Diagnosis diagnosis_;
    Watched watched_;
    PassedOverCounts passed_over_; ///< in this run
    std::map<UpstreamKey, Elsewhere> elsewhere_;
    std::optional<std::uint64_t> overflows_before_; ///< of this host's
    std::uint64_t started_ns_ = 0;
    std::uint64_t newest_ns_ = 0;
    std::uint64_t verdicts_ = 0;
    bool tells_netns_ = false;
};

/// Prints it, and writes its page; the exit status that it comes to.
int report(const DiagnoseOptions& options, const Diagnosis& diagnosis, const Watched& watched)
{
    if (options.json)
        fmt::print(
            "{}\n",
            report_json(diagnosis, watched).dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    else
        fmt::print("{}", report_text(diagnosis, watched, Paint(shows_colours(stdout)),
                                     std::min(terminal_width(), widest_report)));
    if (!options.page.empty())
        write_page_file(options.page, report_html(diagnosis, watched));
    switch (diagnosis.state(watched.is_partial())) {
    case Diagnosis::State::healthy:
        return exit_success;
    case Diagnosis::State::exposed:
    case Diagnosis::State::findings:
        return exit_findings;
    case Diagnosis::State::inconclusive:
        break;
    }
    return exit_inconclusive;
}

/// What was looked at, and by what.
Watched described(Watched watched, const DiagnoseOptions& options, const Feed& feed, std::string_view what)
{
    const SourceFacts& facts = feed.facts();
    watched.host_name = facts.host_name;
    watched.source = printable(fmt::format("{}backend {}", what, facts.backend_text()));
    watched.filter = options.watch.filter.flags;
    watched.stored = !options.files.empty();
    watched.chosen = !options.watch.filter.upstreams.empty() || !options.watch.filter.processes.empty();
    watched.server_side_only = options.watch.filter.side == Side::server;
    return watched;
}

void describe_captures(Watched& watched, const std::vector<CaptureFacts>& captures)
{
    std::vector<std::string> names;
    for (const CaptureFacts& facts : captures) {
        const Vantage& vantage = facts.vantage;
        names.push_back(printable(facts.name));
        watched.captures.push_back(
            {.file = printable(facts.name),
             .place = vantage.place,
             .sure = vantage.sure,
             .host = vantage.host ? address_text(vantage.host->address.data(), vantage.family) : std::string(),
             .at_client = vantage.clients,
             .at_server = vantage.servers,
             .segments = facts.segments,
             .unreadable = facts.unreadable,
             .missing = facts.gaps.missing,
             .one_direction = facts.gaps.one_direction,
             .guessed = facts.gaps.guessed});
    }
    if (!names.empty())
        watched.source = fmt::format("capture {}", fmt::join(names, ", "));
}

int diagnose(const DiagnoseOptions& options)
{
    if (!options.page.empty())
        check_page_file(options.page); // before a minute of watching, not after it
    if (!options.store.empty()) {
        const FleetReport fleet = ask_fleet(options.store, options.since, options.watch.filter);
        return report(options, fleet.diagnosis, fleet.watched);
    }
    if (!options.files.empty()) {
        const std::unique_ptr<StoredFeed> feed = open_stored(options.watch.filter, false, options.files);
        if (options.duration) // said second: what is no file may be an upstream's address
            throw UsageError("--for is how long to watch this host; leave it out where files are read");
        feed->know(options.watch.idle_timers);
        Doctor doctor(*feed, options.watch.filter);
        feed->run(doctor);
        Watched watched = described(doctor.watched(), options, *feed, "recorded by ");
        describe_captures(watched, feed->captures());
        watched.lost += feed->missing();
        const int status = report(options, doctor.diagnosis(), watched);
        return feed->failed() ? exit_unusable : status;
    }
    const std::chrono::nanoseconds duration = options.duration.value_or(by_default);
    LiveLoop feed(options.watch, LiveLoop::unhurried_tick);
    feed.end_after(duration);
    Doctor doctor(feed, options.watch.filter, duration);
    feed.run(doctor);
    return report(options, doctor.diagnosis(), described(doctor.watched(), options, feed, ""));
}

} // namespace

void add_diagnose(CLI::App& program, Action& action)
{
    CLI::App* command =
        program.add_subcommand("diagnose", "one shot: what is wrong, how sure, and which setting to change");
    auto options = std::make_shared<DiagnoseOptions>();
    add_watch_options(*command, options->watch);
    add_duration(*command, options->duration, "default 60s, Ctrl-C ends it sooner");
    command->add_flag("--json", options->json, "the report for programs");
    add_parsed(*command, "--html", "FILE",
               "a page for a browser as well: one file that loads nothing, for its owner alone to read",
               [options](const std::string& text) {
                   if (text.empty() || text == "-")
                       throw UsageError("standard output is the report's own: name a file");
                   options->page = text;
               });
    CLI::Option* store =
        add_parsed(*command, "--clickhouse", "URL",
                   "of all hosts whose records are in this ClickHouse, http[s]://[USER@]HOST[:PORT]; the "
                   "user's password is in $CLICKHOUSE_PASSWORD",
                   [options](const std::string& text) { options->store = text; });
    store->excludes("--backend", "--attach", "--ring-bytes", "--max-connections", "--for", "--idle-timeout");
    add_parsed(*command, "--since", "DURATION", "with --clickhouse, how far back (24h); from the hour's beginning on",
               [options](const std::string& text) { options->since = parse_duration(text); })
        ->needs(store);
    command
        ->add_option("file", options->files,
                     "recordings (finrace record) or captures (tcpdump) to read instead; - is standard input")
        ->type_name("FILE...")
        ->excludes("--backend", "--attach", "--ring-bytes", "--max-connections", "--clickhouse");
    command->footer("Ends with 0 when all is healthy, 1 with findings (but for clients that left) or a pool that will\n"
                    "race, 2 on a usage or environment error, 3 when what was seen is not enough, or not all, or a\n"
                    "failure has no name, 70 on a failure that may pass, such as no memory.\n"
                    "\n"
                    "Examples:\n"
                    "  finrace diagnose --for 5m --upstream 10.0.0.5:8000\n"
                    "  finrace diagnose /var/tmp/finrace.rec\n"
                    "  finrace diagnose --for 10m --html report.html\n"
                    "  finrace diagnose proxy.pcap                 also pcapng; or: tcpdump -w - | finrace diagnose -\n"
                    "  finrace diagnose --clickhouse http://logs:8123 --since 24h\n"
                    "  finrace diagnose --for 60s --json | jq '.findings[].cause'");
    command->callback([options, &action] { action = [options] { return diagnose(*options); }; });
}

} // namespace finrace
