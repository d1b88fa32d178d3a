// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace diagnose: watches for a while, or reads what was recorded, and says what is wrong and what to change.
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "cli/live_loop.h"
#include "cli/options.h"
#include "cli/replay.h"
#include "cli/terminal.h"
#include "core/diagnosis.h"
#include "sink/facts.h"
#include "sink/report.h"

namespace finrace {

namespace {

constexpr int exit_findings = 1;
constexpr int exit_inconclusive = 3;
constexpr std::chrono::nanoseconds tick = std::chrono::milliseconds(200);
constexpr std::chrono::nanoseconds shortest_duration = std::chrono::seconds(1);
constexpr std::chrono::nanoseconds by_default = std::chrono::seconds(60);
constexpr std::size_t widest_report = 110;

struct DiagnoseOptions {
    WatchOptions watch;
    std::chrono::nanoseconds duration = by_default;
    std::vector<std::string> files{};
    bool json = false;
};

class Doctor final : public Listener {
public:
    /// `duration`: after which it ends; without one it takes all that comes.
    Doctor(const Feed& feed, std::optional<std::chrono::nanoseconds> duration)
        : feed_(feed), duration_(duration), shows_progress_(duration && ::isatty(STDERR_FILENO) == 1)
    {
        if (duration_)
            started_ns_ = feed_.now_ns();
    }

    void on_event(const event& e) override
    {
        if (is_client(e) && e.kind == EVENT_CLOSED)
            diagnosis_.note_process(UpstreamKey::of(e), name_of(e));
    }

    void on_verdict(const Judged& judged) override
    {
        ++verdicts_;
        diagnosis_.add(judged, name_of(judged.e));
    }

    bool on_tick() override
    {
        const std::uint64_t now_ns = feed_.now_ns();
        if (started_ns_ == 0)
            started_ns_ = now_ns;
        newest_ns_ = now_ns;
        if (shows_progress_)
            show_progress(now_ns);
        return !duration_ || now_ns - started_ns_ < static_cast<std::uint64_t>(duration_->count());
    }

    void on_end() override
    {
        const std::uint64_t ran_ns = newest_ns_ > started_ns_ ? newest_ns_ - started_ns_ : 0;
        observed_ns_ += ran_ns;
        diagnosis_.add(feed_.intake().upstreams(), ran_ns);
        for (const std::uint64_t count : feed_.counts().losses.by_place)
            lost_ += count;
        started_ns_ = 0;
        if (shows_progress_)
            fmt::print(stderr, "\r\033[K");
    }

    [[nodiscard]] const Diagnosis& diagnosis() const { return diagnosis_; }
    [[nodiscard]] std::uint64_t observed_ns() const { return observed_ns_; }
    [[nodiscard]] std::uint64_t lost() const { return lost_; }

private:
    std::string name_of(const event& e) const { return process_name(e.connection, feed_.names()); }

    void show_progress(std::uint64_t now_ns) const
    {
        std::uint64_t requests = 0;
        feed_.intake().upstreams().for_each(
            [&](const UpstreamKey*, const Upstream& upstream) { requests += upstream.counts.exchanges; });
        fmt::print(stderr, "\r\033[K{} of {} s: {} upstreams, {} requests, {} of them died (Ctrl-C: report now)",
                   (now_ns - started_ns_) / 1'000'000'000, duration_->count() / 1'000'000'000,
                   feed_.intake().upstreams().size(), requests, verdicts_);
        std::fflush(stderr);
    }

    const Feed& feed_;
    std::optional<std::chrono::nanoseconds> duration_;
    bool shows_progress_;
    Diagnosis diagnosis_;
    std::uint64_t started_ns_ = 0;
    std::uint64_t newest_ns_ = 0;
    std::uint64_t observed_ns_ = 0;
    std::uint64_t lost_ = 0;
    std::uint64_t verdicts_ = 0;
};

int report(const DiagnoseOptions& options, const Feed& feed, const Doctor& doctor, std::string source, bool failed)
{
    const SourceFacts& facts = feed.facts();
    const Watched watched{.host_name = facts.host_name,
                          .source = std::move(source),
                          .observed_ns = doctor.observed_ns(),
                          .lost = doctor.lost(),
                          .tells_outcomes = facts.tells_outcomes,
                          .missing_hooks = facts.missing.size(),
                          .clock = feed.clock()};
    if (options.json)
        fmt::print("{}\n", report_json(doctor.diagnosis(), watched).dump(2));
    else
        fmt::print("{}", report_text(doctor.diagnosis(), watched, Paint(shows_colours(stdout)),
                                     std::min(terminal_width(), widest_report)));
    if (failed)
        return exit_unusable;
    switch (doctor.diagnosis().state(watched.lost > 0)) {
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

int diagnose(const DiagnoseOptions& options)
{
    if (!options.files.empty()) {
        Replay feed(options.watch.filter, false, options.files);
        Doctor doctor(feed, std::nullopt);
        feed.run(doctor);
        const SourceFacts& facts = feed.facts();
        return report(options, feed, doctor,
                      fmt::format("a recording of backend {}{}", printable(facts.backend),
                                  facts.attach.empty() ? "" : " by " + printable(facts.attach)),
                      feed.failed());
    }
    check_combination(options.watch);
    LiveLoop feed(options.watch, tick);
    Doctor doctor(feed, options.duration);
    feed.run(doctor);
    const SourceFacts& facts = feed.facts();
    return report(options, feed, doctor,
                  fmt::format("backend {}{}", facts.backend, facts.attach.empty() ? "" : " by " + facts.attach), false);
}

} // namespace

void add_diagnose(CLI::App& program, Action& action)
{
    CLI::App* command =
        program.add_subcommand("diagnose", "one shot: what is wrong, how sure, and which setting to change");
    auto options = std::make_shared<DiagnoseOptions>();
    add_watch_options(*command, options->watch);
    CLI::Option* duration =
        add_parsed(*command, "--for", "DURATION", "watch for this long (60s, 10m); default 60s, Ctrl-C ends it sooner",
                   [options](const std::string& text) {
                       options->duration = parse_duration(text);
                       if (options->duration < shortest_duration)
                           throw UsageError(fmt::format("'{}' is too short; accepted: 1s and more", text));
                   });
    command->add_flag("--json", options->json, "the report for programs");
    command->add_option("file", options->files, "recordings to read (finrace record) instead; - is standard input")
        ->type_name("FILE...")
        ->excludes(duration)
        ->excludes("--backend", "--attach", "--ring-bytes");
    command->footer("Ends with 0 when all is healthy, 1 with findings or a pool that will race, 2 on a usage or\n"
                    "environment error, 3 when what was seen is not enough, or not all.\n"
                    "\n"
                    "Examples:\n"
                    "  finrace diagnose --for 5m --upstream 10.0.0.5:8000\n"
                    "  finrace diagnose /var/tmp/finrace.rec\n"
                    "  finrace diagnose --for 60s --json | jq '.findings[].cause'");
    command->callback([options, &action] { action = [options] { return diagnose(*options); }; });
}

} // namespace finrace
