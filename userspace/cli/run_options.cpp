// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/run_options.h"

#include <cerrno>
#include <cstring>
#include <set>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>

#include "cli/confinement.h"
#include "cli/metrics_server.h"

namespace finrace {

namespace {

constexpr std::chrono::nanoseconds shortest_interval = std::chrono::milliseconds(10);

/// What changes nothing in the kernel, opens nothing, and shows nothing that was hidden.
const std::set<std::string> changeable{"flat",    "for",  "idle_timeout", "interval",
                                       "process", "side", "upstream",     "upstream_name"};
/// Of these what a recording's header tells.
const std::set<std::string> recorded{"process", "side", "upstream"};

} // namespace

void add_run_options(CLI::App& command, RunOptions& options)
{
    add_watch_options(command, options.watch);
    add_parsed(command, "--output", "FILE|KIND:PATH",
               fmt::format("where records go: {}; may be repeated. A file is appended to (created with mode 0600)",
                           output_forms),
               [&options](const std::string& text) { options.outputs.push_back(parse_output(text)); })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    add_parsed(command, "--interval", "DURATION", "time between summaries (250ms, 10s, 2m); default 10s",
               [&options](const std::string& text) {
                   options.interval = parse_duration(text);
                   if (options.interval < shortest_interval)
                       throw UsageError(fmt::format("'{}' is too short; accepted: 10ms and more", text));
               });
    add_duration(command, options.duration, "without it until a signal ends it");
    command.add_flag("--connections", options.connections,
                     "one record for the end of every connection, healthy and accepted ones too");
    command.add_flag("--flat", options.flat,
                     "records of one level, {\"network.peer.port\":8000}: as ClickHouse and OpenTelemetry name things");
    add_record_options(command, "--record", options.record);
    add_parsed(command, "--metrics", "[ADDR:]PORT",
               "serve metrics for Prometheus at http://ADDR:PORT/metrics; without ADDR on 127.0.0.1 alone",
               [&options](const std::string& text) { options.metrics = parse_metrics_address(text); });
    add_address_options(command, options.addresses);
    add_confinement_option(command, options.unconfined);
    add_config_options(command, options.config);
    command
        .add_option("--replay", options.replayed,
                    "judge what was recorded (finrace record, --record, or tcpdump) instead; - is standard input")
        ->type_name("FILE...")
        ->excludes("--for", "--record", "--rotate", "--keep", "--backend", "--attach", "--ring-bytes",
                   "--max-connections", "--unconfined", "--config", "--metrics");
}

void check_run_options(const RunOptions& options)
{
    check_combination(options.watch);
    [[maybe_unused]] const Disguise disguise = options.addresses.disguise();
    if (options.addresses.disguises() && !options.record.path.empty())
        throw UsageError("--record: a recording has addresses as they are; leave it out, or what disguises them");
    if (options.addresses.masked == Disguise::Scope::all && options.metrics)
        throw UsageError(
            "--metrics: masked upstreams look alike; take --hash-addresses all, or --mask-addresses clients");
}

std::string reload_text()
{
    return fmt::format("Of --config's keys {} change while it runs, and no\n"
                       "connection's state is lost ({} not with --record, whose header tells them);\n"
                       "all others take a restart.\n",
                       fmt::join(changeable, ", "), fmt::join(recorded, ", "));
}

Reloader::Reloader(CLI::App& command, const std::string& path) : path_(path), given_(settings_of(command))
{
    places_ = take_config(command, path_);
    in_use_ = settings_of(command);
}

bool Reloader::can_read_again() const
{
    struct stat status {};
    return ::stat(path_.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

std::string Reloader::make_absolute()
{
    return path_ = absolute_path(path_);
}

Reloader::Reloaded Reloader::read(const SourceFacts& facts, bool records)
{
    errno = 0;
    if (!can_read_again()) // what is no file may keep whoever opens it waiting
        throw UsageError(
            fmt::format("--config {}: {}", path_, errno != 0 ? std::strerror(errno) : "no regular file any more"));
    CLI::App as_read;
    RunOptions unused;
    add_run_options(as_read, unused);
    take_settings(as_read, given_);
    const KeyPlaces places = take_config(as_read, path_);

    Reloaded reloaded{.options = std::make_unique<RunOptions>(), .taken = {}, .left = {}};
    Settings in_use = in_use_;
    for (const auto& [key, texts] : settings_of(as_read)) {
        if (texts == in_use[key])
            continue;
        const bool can_change = changeable.contains(key) && !(records && recorded.contains(key));
        (can_change ? reloaded.taken : reloaded.left).push_back(key);
        if (can_change)
            in_use[key] = texts;
    }
    CLI::App as_used;
    add_run_options(as_used, *reloaded.options);
    take_settings(as_used, in_use);
    try {
        check_combination(reloaded.options->watch); // of the others' partners none can change
        check_told(reloaded.options->watch.filter, facts);
    } catch (const UsageError& error) {
        throw UsageError(finrace::located(places, error.what()));
    }
    in_use_ = std::move(in_use);
    return reloaded;
}

} // namespace finrace
