// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace run: the daemon. Records as JSON lines, until a signal ends it or nobody reads them any more.
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "cli/live_loop.h"
#include "cli/options.h"
#include "sink/history.h"
#include "sink/json.h"
#include "sink/stream.h"

namespace finrace {

namespace {

constexpr std::chrono::nanoseconds shortest_interval = std::chrono::milliseconds(10);
constexpr std::chrono::milliseconds last_words = std::chrono::seconds(1);

struct RunOptions {
    WatchOptions watch;
    std::string output = "-";
    std::chrono::nanoseconds interval = std::chrono::seconds(10);
    bool connections = false;
};

std::string host_name()
{
    std::string name(256, '\0');
    if (::gethostname(name.data(), name.size() - 1) != 0)
        return "localhost";
    name.resize(std::strlen(name.c_str()));
    return name;
}

class Recorder final : public LiveListener {
public:
    Recorder(const RunOptions& options, Stream& stream, const LiveLoop& loop)
        : options_(options), stream_(stream), loop_(loop), started_(std::chrono::steady_clock::now()),
          next_summary_(started_ + options.interval), host_name_(host_name())
    {
    }

    void on_event(const event& e) override
    {
        if (options_.connections) {
            histories_.add(e);
            if (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED)
                put(connection_record(origin(), e, histories_.take(e.connection.id), process_name(e.connection)));
        }
        if (stream_.waiting() >= flush_bytes)
            stream_.flush();
    }

    void on_verdict(const Judged& judged) override
    {
        const Verdict& verdict = *judged.classification.verdict;
        const std::string name = process_name(judged.e.connection);
        put(judged.benched != nullptr
                ? benched_record(origin(), judged.e, *judged.benched, verdict, name, judged.outcome)
                : verdict_record(origin(), judged.e, verdict, judged.upstream, name, judged.outcome,
                                 judged.server_end));
        stream_.flush(); // the rest of the batch must not keep it waiting
    }

    bool on_tick() override
    {
        if (const auto now = std::chrono::steady_clock::now(); now >= next_summary_) {
            summarise(false);
            while (next_summary_ <= now)
                next_summary_ += options_.interval;
        }
        stream_.flush();
        say_problem();
        return !stream_.closed_by_reader();
    }

    [[nodiscard]] int output_descriptor() const override { return stream_.descriptor(); }
    void on_reader_left() override { stream_.reader_left(); }

    /// Logs were rotated.
    bool on_hangup() override
    {
        if (options_.output == "-")
            return false;
        try {
            stream_.reopen(options_.output);
            say(fmt::format("{} is opened anew", options_.output));
        } catch (const OutputError& error) {
            say(fmt::format("{}; records go on into the file that was open before", error.what()));
        }
        return true;
    }

    void summarise(bool last)
    {
        const std::uint64_t now_ns = WallClock::monotonic_now_ns();
        loop_.upstreams().for_each([&](const UpstreamKey* key, const Upstream& upstream) {
            put(upstream_record(origin(), now_ns, key, upstream));
        });
        put(health_record(origin(), now_ns, health(last)));
    }

private:
    static constexpr std::size_t flush_bytes = 64U << 10U;

    Origin origin() const { return {.host_name = host_name_, .clock = loop_.clock()}; }

    void put(const Json& record) { stream_.write(to_line(record)); }

    Health health(bool last) const
    {
        const LiveSource& source = loop_.source();
        const loss_counters losses = source.losses();
        Health health{
            .version = FINRACE_VERSION,
            .backend = source.backend(),
            .attach = source.attach(),
            .interval = options_.interval,
            .uptime = std::chrono::steady_clock::now() - started_,
            .last = last,
            .connections_begun = source.connections_begun(),
            .connections_adopted = source.connections_adopted(),
            .connections_ended = loop_.connections_ended(losses),
            .events = loop_.events(),
            .outcome_events = loop_.outcome_events(),
            .losses = losses,
            .records_written = stream_.written(),
            .records_dropped = stream_.dropped(),
            .bytes_waiting = stream_.waiting(),
            .missing_hooks = {},
            .upstreams = loop_.upstreams().size(),
            .verdicts = loop_.verdicts(),
            .unclassified = loop_.unclassified(),
        };
        for (const Hook& hook : source.hooks())
            if (!hook.attached)
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
    const LiveLoop& loop_;
    std::chrono::steady_clock::time_point started_;
    std::chrono::steady_clock::time_point next_summary_;
    std::string host_name_;
    StateHistories histories_;
    int problem_said_ = 0;
};

int run(RunOptions options)
{
    check_combination(options.watch);
    Stream stream = options.output == "-" ? Stream::to_descriptor(STDOUT_FILENO) : Stream::to_file(options.output);
    options.watch.live.follow_accepted = options.connections;
    options.watch.live.report_states = options.connections;

    LiveLoop loop(options.watch, options.interval);
    Recorder recorder(options, stream, loop);
    loop.run(recorder);

    if (stream.closed_by_reader()) {
        say("nobody reads the output any more: ending");
        return exit_success;
    }
    recorder.summarise(true);
    stream.drain(last_words);
    if (stream.dropped() > 0)
        say(fmt::format("{} records were dropped: the output did not take them", stream.dropped()));
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
    command->add_flag("--connections", options->connections,
                      "one record for the end of every connection, healthy and accepted ones too");
    command->footer(
        "Ends with 0 on SIGINT or SIGTERM, after a last summary, and when nobody reads its output any more.\n"
        "SIGHUP and SIGUSR1 open the --output file anew, for log rotation; without one SIGHUP ends it.\n"
        "\n"
        "Examples:\n"
        "  finrace run --output /var/log/finrace.jsonl\n"
        "  finrace run --upstream 10.0.0.0/8:8000 --process nginx --interval 1m\n"
        "  finrace run | jq -r 'select(.event.name == \"finrace.verdict\") |\n"
        "    [.timestamp, .network.peer.address, .finrace.cause, .finrace.message] | @tsv'");
    command->callback([options, &action] { action = [options] { return run(*options); }; });
}

} // namespace finrace
