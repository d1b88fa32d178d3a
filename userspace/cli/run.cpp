// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace run: the daemon. Records as JSON lines, until a signal ends it or nobody reads them any more.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/confinement.h"
#include "cli/live_loop.h"
#include "cli/metrics_server.h"
#include "cli/options.h"
#include "cli/outputs.h"
#include "cli/recorder.h"
#include "cli/reporter.h"
#include "cli/run_options.h"
#include "cli/service_manager.h"
#include "cli/stored_feed.h"
#include "sink/stream.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

int replay(const RunOptions& options)
{
    let_writes_fail();
    const std::unique_ptr<StoredFeed> feed = open_stored(options.watch.filter, options.connections, options.replayed);
    for (const OutputTarget& target : options.outputs) {
        // Asked first: to open it for records ends a line in it.
        const Descriptor there(target.kind == OutputTarget::Kind::standard_output
                                   ? ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0)
                                   : ::open(target.path.c_str(), O_PATH | O_CLOEXEC));
        if (feed->reads(there.get()))
            throw UsageError(
                fmt::format("--output {}: that is one of the files that are read; name another", target.text()));
    }
    Outputs outputs(options.outputs, options.flat);
    feed->know(options.watch.idle_timers);
    Reporter reporter(options, outputs, *feed);
    feed->run(reporter);
    outputs.drain(Reporter::slowest_reader);
    if (outputs.ended())
        return feed->failed() ? exit_unusable : exit_success;
    for (const OutputState& state : outputs.states())
        if (state.dropped > 0)
            throw OutputError(fmt::format("cannot write records to {}{}; {} of them are missing", state.name,
                                          state.problem != 0 ? fmt::format(": {}", std::strerror(state.problem)) : "",
                                          state.dropped));
    return feed->failed() ? exit_unusable : exit_success;
}

/// SIGHUP: what the file says now.
void reload(Reloader& reloader, Reporter& reporter, LiveLoop& feed, bool records)
{
    try {
        const Reloader::Reloaded fresh = reloader.read(feed.facts(), records);
        if (!fresh.taken.empty()) {
            reporter.change(*fresh.options);
            feed.filter(fresh.options->watch.filter);
            feed.know(fresh.options->watch.idle_timers);
            feed.tick_every(fresh.options->interval);
            feed.end_after(fresh.options->duration);
            say(fmt::format("taken anew: {}", fmt::join(fresh.taken, ", ")));
        }
        if (!fresh.left.empty())
            say(fmt::format("changed in the file, but as before until a restart: {}", fmt::join(fresh.left, ", ")));
    } catch (const UsageError& error) {
        say(fmt::format("{}; all goes on as before", error.what()));
    }
}

int run(RunOptions options, Reloader* reloader)
{
    check_run_options(options);
    if (options.outputs.empty())
        options.outputs.emplace_back();
    if (!options.replayed.empty())
        return replay(options);
    ServiceManager manager;
    Outputs outputs(options.outputs, options.flat);
    if (!options.unconfined)
        outputs.make_absolute();
    options.watch.live.follow_accepted = options.connections;
    options.watch.live.report_states = options.connections;

    std::optional<Recorder> recorder;
    if (!options.record.path.empty()) {
        recorder.emplace(options.record);
        if (const std::optional<std::string> same = outputs.same_file(recorder->descriptor()))
            throw UsageError(fmt::format("--record {} and --output {} are the same; give each a file of its own",
                                         options.record.path, *same));
    }
    // Before it says that it is ready.
    std::optional<MetricsListener> metrics;
    if (options.metrics)
        metrics.emplace(*options.metrics);
    const int will_listen = metrics && metrics->problem() != 0 ? metrics->descriptor() : -1;
    LiveLoop feed(options.watch, options.interval, recorder ? &*recorder : nullptr);
    feed.end_after(options.duration);
    Reporter reporter(options, outputs, feed);
    if (recorder)
        reporter.tell_of(*recorder);
    if (metrics)
        reporter.serve_metrics(feed, std::move(*metrics));
    if (reloader != nullptr)
        reporter.reload_by([&] { reload(*reloader, reporter, feed, recorder.has_value()); });
    std::optional<Confinement> confinement;
    if (!options.unconfined) {
        Needed needed{.files = outputs.files(),
                      .sockets = outputs.sockets(),
                      .listed = {PodNames::usual_folder},
                      .serves = options.metrics.has_value(),
                      .will_listen = will_listen,
                      .with_rights = [&] { feed.use_rights(); }};
        if (reloader != nullptr && reloader->can_read_again())
            needed.read.push_back(reloader->make_absolute());
        if (recorder)
            for (std::string& file : recorder->files())
                needed.files.push_back(std::move(file));
        confinement = confine(needed, [&] { return feed.counts_losses(); });
    }
    outputs.write_behind();
    if (recorder)
        recorder->write_behind();
    reporter.serve(manager, confinement);
    feed.run(reporter);

    if (recorder)
        say_missing(*recorder);
    if (outputs.ended()) {
        say("nobody reads the output any more: ending");
        return exit_success;
    }
    outputs.drain(Stream::last_words);
    outputs.say_dropped();
    return exit_success;
}

/// A start here would be refused; but a file may be written for another host.
void warn_of_folders(const RunOptions& options)
{
    const auto check = [](const std::string& flag, const std::string& path) {
        const std::filesystem::path folder = std::filesystem::path(path).parent_path();
        std::error_code problem;
        if (!folder.empty() && std::filesystem::status(folder, problem).type() == std::filesystem::file_type::not_found)
            say(fmt::format("warning: {} {}: there is no folder {} here, so a start would be refused", flag, path,
                            folder.string()));
    };
    for (const OutputTarget& target : options.outputs)
        if (target.kind == OutputTarget::Kind::file)
            check("--output", target.path);
    if (!options.record.path.empty() && options.record.path != "-")
        check("--record", options.record.path);
}

int configured_run(CLI::App& command, RunOptions& options)
{
    std::optional<Reloader> reloader;
    if (options.config.path)
        reloader.emplace(command, *options.config.path);
    try {
        check_record_options(command, "--record");
        if (!options.config.only_checked)
            return run(options, reloader ? &*reloader : nullptr);
        check_run_options(options);
        warn_of_folders(options);
    } catch (const UsageError& error) {
        throw UsageError(reloader ? reloader->located(error.what()) : error.what());
    }
    fmt::print("{} is good\n", options.config.path.value_or(""));
    return exit_success;
}

} // namespace

void add_run(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("run", "the daemon: JSON lines on standard output, or elsewhere");
    auto options = std::make_shared<RunOptions>();
    add_run_options(*command, *options);
    command->footer(
        "Ends with 0 on SIGINT or SIGTERM, after a last summary, and when nobody reads its output any more;\n"
        "2 on what the next start would meet as well: a wrong flag, no rights; 70 on what may pass: no memory.\n"
        "SIGHUP and SIGUSR1 open the files among its outputs anew, for log rotation, and read --config anew;\n"
        "with nothing but standard output and no --config, SIGHUP ends it, but not as a service.\n" +
        reload_text() +
        "\n"
        "Examples:\n"
        "  finrace run --output /var/log/finrace.jsonl\n"
        "  finrace run --output /var/log/finrace.jsonl --output journald --metrics 9735\n"
        "  finrace run --config /etc/finrace/finrace.toml --check-config\n"
        "  finrace run --upstream 10.0.0.0/8:8000 --process nginx --interval 1m\n"
        "  finrace run | jq -r 'select(.event.name == \"finrace.verdict\") |\n"
        "    [.timestamp, .network.peer.address, .finrace.cause, .finrace.message] | @tsv'");
    command->callback(
        [options, command, &action] { action = [options, command] { return configured_run(*command, *options); }; });
}

} // namespace finrace
