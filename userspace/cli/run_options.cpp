// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/run_options.h"

#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "cli/confinement.h"
#include "cli/metrics_server.h"

namespace finrace {

namespace {

constexpr std::chrono::nanoseconds shortest_interval = std::chrono::milliseconds(10);

/// What changes nothing in the kernel, and opens nothing.
const std::set<std::string> changeable{"interval",       "upstream",       "process", "upstream_name",
                                       "mask_addresses", "hash_addresses", "hash_key"};
/// Of these what a recording's header tells.
const std::set<std::string> recorded{"upstream", "process"};

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
        ->excludes("--for", "--record", "--rotate", "--keep", "--backend", "--attach", "--ring-bytes", "--unconfined",
                   "--config", "--metrics");
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

Reloader::Reloader(CLI::App& command, const std::string& path) : path_(path), given_(settings_of(command))
{
    take_config(command, path_);
    in_use_ = settings_of(command);
}

void Reloader::make_absolute(const std::string& key_path)
{
    path_ = absolute_path(path_);
    key_path_ = key_path.empty() ? "" : absolute_path(key_path);
}

std::vector<std::string> Reloader::files() const
{
    std::vector<std::string> names{path_};
    if (!key_path_.empty())
        names.push_back(key_path_);
    return names;
}

Reloader::Reloaded Reloader::read(bool records)
{
    CLI::App command;
    Reloaded reloaded{.options = std::make_unique<RunOptions>(), .taken = {}, .left = {}};
    add_run_options(command, *reloaded.options);
    take_settings(command, given_);
    take_config(command, path_);
    check_run_options(*reloaded.options);
    const Settings fresh = settings_of(command);
    Settings in_use = in_use_;
    for (const auto& [key, texts] : fresh) {
        if (texts == in_use[key])
            continue;
        const bool can_change = changeable.contains(key) && !(records && recorded.contains(key));
        (can_change ? reloaded.taken : reloaded.left).push_back(key);
        if (can_change)
            in_use[key] = texts;
    }
    in_use_ = std::move(in_use);
    return reloaded;
}

} // namespace finrace
