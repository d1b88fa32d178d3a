// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace run: the daemon. Records as JSON lines, until a signal ends it or nobody reads them any more.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "cli/config_file.h"
#include "cli/confinement.h"
#include "cli/live_loop.h"
#include "cli/options.h"
#include "cli/recorder.h"
#include "cli/service_manager.h"
#include "cli/stored_feed.h"
#include "sink/history.h"
#include "sink/json.h"
#include "sink/stream.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

constexpr std::chrono::nanoseconds shortest_interval = std::chrono::milliseconds(10);
constexpr std::chrono::milliseconds last_words = std::chrono::seconds(1);
/// A replay waits for whoever reads its records.
constexpr std::chrono::milliseconds slowest_reader = std::chrono::hours(24);

struct RunOptions {
    WatchOptions watch;
    std::string output = "-";
    std::chrono::nanoseconds interval = std::chrono::seconds(10);
    std::optional<std::chrono::nanoseconds> duration{};
    bool connections = false;
    RecordOptions record{};
    std::vector<std::string> replayed{};
    bool unconfined = false;
    ConfigFile config{};
};

class Reporter final : public Listener {
public:
    Reporter(const RunOptions& options, Stream& stream, const Feed& feed)
        : options_(options), stream_(stream), feed_(feed)
    {
        begin();
    }

    /// What a daemon has besides: whom it tells how it is, and what is left to it.
    void serve(ServiceManager& manager, const std::optional<Confinement>& confinement)
    {
        manager_ = &manager;
        confinement_ = confinement;
        manager_->ready(state());
    }

    void on_event(const event& e) override
    {
        if (options_.connections) {
            histories_.add(e);
            if (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED)
                put(connection_record(origin(), e, histories_.take(e.connection.id), name_of(e.connection)));
        }
        if (stream_.waiting() >= flush_bytes)
            flush();
    }

    void on_verdict(const Judged& judged) override
    {
        const Verdict& verdict = *judged.classification.verdict;
        const std::string name = name_of(judged.e.connection);
        put(judged.benched != nullptr
                ? benched_record(origin(), judged.e, *judged.benched, verdict, name, judged.outcome)
                : verdict_record(origin(), judged.e, verdict, judged.upstream, name, judged.outcome,
                                 judged.server_end));
        flush(); // the rest of the batch must not keep it waiting
    }

    bool on_tick() override
    {
        if (started_ns_ == 0)
            begin();
        if (const std::uint64_t now_ns = feed_.now_ns(); now_ns >= next_summary_ns_) {
            summarise(false);
            next_summary_ns_ += (1 + (now_ns - next_summary_ns_) / interval_ns()) * interval_ns();
        }
        flush();
        say_problem();
        if (manager_ != nullptr)
            manager_->alive();
        return !stream_.closed_by_reader();
    }

    void on_end() override
    {
        if (manager_ != nullptr)
            manager_->stopping();
        if (started_ns_ == 0)
            begin();
        if (!stream_.closed_by_reader())
            summarise(true);
        started_ns_ = 0;
        histories_ = StateHistories();
        told_.clear();
    }

    [[nodiscard]] int output_descriptor() const override { return stream_.descriptor(); }
    void on_reader_left() override { stream_.reader_left(); }

    /// Logs were rotated.
    bool on_hangup() override
    {
        struct stat status {};
        if (options_.output == "-")
            return manager_ != nullptr && manager_->is_there(); // a service ends by SIGTERM
        if (manager_ != nullptr)
            manager_->reloading();
        if (::fstat(stream_.descriptor(), &status) != 0 || !S_ISCHR(status.st_mode)) // nobody rotates a device
            open_anew();
        if (manager_ != nullptr)
            manager_->reloaded();
        return true;
    }

private:
    static constexpr std::size_t flush_bytes = 64U << 10U;

    void open_anew()
    {
        try {
            stream_.reopen(options_.output);
            say(fmt::format("{} is opened anew", options_.output));
        } catch (const OutputError& error) {
            say(fmt::format("{}; records go on into the file that was open before", error.what()));
        }
    }

    void summarise(bool last)
    {
        const std::uint64_t now_ns = feed_.now_ns();
        std::unordered_map<UpstreamKey, UpstreamCounts, UpstreamKeyHash> told;
        feed_.intake().upstreams().for_each([&](const UpstreamKey* key, const Upstream& upstream) {
            const UpstreamKey where = key != nullptr ? *key : UpstreamKey{};
            const auto before = told_.find(where);
            if (last || before == told_.end() || before->second != upstream.counts)
                put(upstream_record(origin(), now_ns, key, upstream));
            told.emplace(where, upstream.counts);
        });
        told_ = std::move(told);
        put(health_record(origin(), now_ns, health(last)));
        if (manager_ != nullptr)
            manager_->status(state());
    }

    /// In a line, for `systemctl status`.
    std::string state() const
    {
        const SourceCounts counts = feed_.counts();
        return fmt::format("backend {}: {} connections, {} verdicts, {} lost; {} records written, {} dropped",
                           feed_.facts().backend_text(), counts.connections_begun, feed_.intake().verdicts_in_all(),
                           counts.lost(), stream_.written(), stream_.dropped());
    }

    /// A recording's run begins with its first tick.
    void begin()
    {
        started_ns_ = feed_.now_ns();
        next_summary_ns_ = started_ns_ + interval_ns();
    }

    std::uint64_t interval_ns() const { return static_cast<std::uint64_t>(options_.interval.count()); }

    /// The kernel's events don't wait for a slow reader; a recording does.
    void flush()
    {
        if (options_.replayed.empty())
            stream_.flush();
        else if (stream_.waiting() > 0)
            stream_.drain(slowest_reader);
    }

    std::string name_of(const connection& c) const { return process_name(c, feed_.names()); }

    Origin origin() const { return {.host_name = feed_.facts().host_name, .clock = feed_.clock()}; }

    void put(const Json& record) { stream_.write(to_line(record)); }

    Health health(bool last) const
    {
        const SourceFacts& facts = feed_.facts();
        const SourceCounts counts = feed_.counts();
        const Intake& intake = feed_.intake();
        Health health{
            .version = FINRACE_VERSION,
            .backend = facts.backend,
            .attach = facts.attach,
            .interval = options_.interval,
            .uptime = std::chrono::nanoseconds(feed_.now_ns() - started_ns_),
            .last = last,
            .connections_begun = counts.connections_begun,
            .connections_adopted = counts.connections_adopted,
            .connections_ended = intake.connections_ended(counts.losses),
            .events = intake.events(),
            .outcome_events = intake.outcome_events(),
            .losses = counts.losses,
            .records_written = stream_.written(),
            .records_dropped = stream_.dropped(),
            .bytes_waiting = stream_.waiting(),
            .missing_hooks = {},
            .upstreams = intake.upstreams().size(),
            .verdicts = intake.verdicts(),
            .unclassified = intake.unclassified(),
            .confinement = confinement_,
        };
        for (const Hook& hook : facts.missing)
            health.missing_hooks.push_back({.name = hook.name, .purpose = hook.purpose, .problem = hook.problem});
        return health;
    }

    void say_problem()
    {
        const int problem = stream_.problem();
        if (problem != 0 && problem != problem_said_)
            say(fmt::format("cannot write records to {}: {}; they wait ({} MiB at most) and are tried again",
                            options_.output, std::strerror(problem), Stream::default_backlog >> 20U));
        else if (problem == 0 && problem_said_ != 0)
            say("records are written again");
        problem_said_ = problem;
    }

    const RunOptions& options_;
    Stream& stream_;
    const Feed& feed_;
    std::uint64_t started_ns_ = 0;
    std::uint64_t next_summary_ns_ = 0;
    StateHistories histories_;
    std::unordered_map<UpstreamKey, UpstreamCounts, UpstreamKeyHash> told_; ///< as the newest summary has them
    int problem_said_ = 0;
    ServiceManager* manager_ = nullptr; ///< none in a replay
    std::optional<Confinement> confinement_;
};

Stream open_output(const std::string& path)
{
    return path == "-" ? Stream::to_descriptor(STDOUT_FILENO) : Stream::to_file(path);
}

int replay(const RunOptions& options)
{
    ::signal(SIGPIPE, SIG_IGN); // a reader that leaves is told by EPIPE
    const std::unique_ptr<StoredFeed> feed = open_stored(options.watch.filter, options.connections, options.replayed);
    // Asked first: to open it for records ends a line in it.
    const Descriptor there(options.output == "-" ? ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0)
                                                 : ::open(options.output.c_str(), O_PATH | O_CLOEXEC));
    if (feed->reads(there.get()))
        throw UsageError(
            fmt::format("--output {}: that is one of the files that are read; name another", options.output));
    Stream stream = open_output(options.output);
    Reporter reporter(options, stream, *feed);
    feed->run(reporter);
    stream.drain(slowest_reader);
    if (stream.closed_by_reader())
        return feed->failed() ? exit_unusable : exit_success;
    if (stream.dropped() > 0)
        throw OutputError(fmt::format("cannot write records to {}{}; {} of them are missing", options.output,
                                      stream.problem() != 0 ? fmt::format(": {}", std::strerror(stream.problem())) : "",
                                      stream.dropped()));
    return feed->failed() ? exit_unusable : exit_success;
}

int run(RunOptions options)
{
    check_combination(options.watch);
    if (!options.replayed.empty())
        return replay(options);
    ServiceManager manager;
    Stream stream = open_output(options.output);
    if (options.output != "-" && !options.unconfined)
        options.output = absolute_path(options.output); // the folder that it is relative to will be gone
    options.watch.live.follow_accepted = options.connections;
    options.watch.live.report_states = options.connections;

    std::optional<Recorder> recorder;
    if (!options.record.path.empty()) {
        recorder.emplace(options.record);
        if (is_same_file(recorder->descriptor(), stream.descriptor()))
            throw UsageError(fmt::format("--record {} and --output {} are the same; give each a file of its own",
                                         options.record.path, options.output));
    }
    LiveLoop feed(options.watch, options.interval, recorder ? &*recorder : nullptr);
    feed.end_after(options.duration);
    Reporter reporter(options, stream, feed);
    std::optional<Confinement> confinement;
    if (!options.unconfined) {
        std::vector<std::string> outputs{options.output};
        if (recorder)
            outputs.push_back(recorder->path());
        confinement = confine(std::move(outputs), [&] { return feed.counts_losses(); });
    }
    reporter.serve(manager, confinement);
    feed.run(reporter);

    if (recorder)
        say_missing(*recorder);
    if (stream.closed_by_reader()) {
        say("nobody reads the output any more: ending");
        return exit_success;
    }
    stream.drain(last_words);
    if (stream.dropped() > 0)
        say(fmt::format("{} records were dropped: the output did not take them", stream.dropped()));
    return exit_success;
}

int configured_run(CLI::App& command, RunOptions& options)
{
    if (options.config.path)
        take_config(command, *options.config.path);
    check_record_options(command, "--record");
    if (!options.config.only_checked)
        return run(options);
    check_combination(options.watch);
    fmt::print("{} is good\n", options.config.path.value_or(""));
    return exit_success;
}

} // namespace

void add_run(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("run", "the daemon: JSON lines on standard output, or to a file");
    auto options = std::make_shared<RunOptions>();
    add_watch_options(*command, options->watch);
    command
        ->add_option("--output", options->output, "append to this file (created with mode 0600); - is standard output")
        ->type_name("FILE");
    add_parsed(*command, "--interval", "DURATION", "time between summaries (250ms, 10s, 2m); default 10s",
               [options](const std::string& text) {
                   options->interval = parse_duration(text);
                   if (options->interval < shortest_interval)
                       throw UsageError(fmt::format("'{}' is too short; accepted: 10ms and more", text));
               });
    add_duration(*command, options->duration, "without it until a signal ends it");
    command->add_flag("--connections", options->connections,
                      "one record for the end of every connection, healthy and accepted ones too");
    add_record_options(*command, "--record", options->record);
    add_confinement_option(*command, options->unconfined);
    add_config_options(*command, options->config);
    command
        ->add_option("--replay", options->replayed,
                     "judge what was recorded (finrace record, --record, or tcpdump) instead; - is standard input")
        ->type_name("FILE...")
        ->excludes("--for", "--record", "--rotate", "--keep", "--backend", "--attach", "--ring-bytes", "--unconfined",
                   "--config");
    command->footer(
        "Ends with 0 on SIGINT or SIGTERM, after a last summary, and when nobody reads its output any more.\n"
        "SIGHUP and SIGUSR1 open the --output file anew, for log rotation; without one SIGHUP ends it,\n"
        "but not as a service.\n"
        "\n"
        "Examples:\n"
        "  finrace run --output /var/log/finrace.jsonl\n"
        "  finrace run --config /etc/finrace/finrace.toml --check-config\n"
        "  finrace run --upstream 10.0.0.0/8:8000 --process nginx --interval 1m\n"
        "  finrace run | jq -r 'select(.event.name == \"finrace.verdict\") |\n"
        "    [.timestamp, .network.peer.address, .finrace.cause, .finrace.message] | @tsv'");
    command->callback(
        [options, command, &action] { action = [options, command] { return configured_run(*command, *options); }; });
}

} // namespace finrace
