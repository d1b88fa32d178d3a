// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The flags that commands share, and what each command is to the program.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/command_line.h"
#include "cli/filter.h"
#include "cli/idle_timers.h"
#include "cli/parse.h"
#include "source/live.h"

namespace finrace {

constexpr int exit_success = 0;
constexpr int exit_unusable = 2; ///< a usage or environment error
constexpr int exit_failed = 70;  ///< nobody's mistake: another try may do (EX_SOFTWARE, sysexits.h)

/// What a command does once its flags are read; returns the exit status.
using Action = std::function<int()>;

// Each adds its command to the program, and sets `action` when that command is chosen.
void add_run(CLI::App& program, Action& action);
void add_watch(CLI::App& program, Action& action);
void add_record(CLI::App& program, Action& action);
void add_diagnose(CLI::App& program, Action& action);
void add_doctor(CLI::App& program, Action& action);
void add_explain(CLI::App& program, Action& action);
void add_manual(CLI::App& program, Action& action);
void add_completion(CLI::App& program, Action& action);
void add_help(CLI::App& program, Action& action);
/// How --help looks, for the commands that are added from now on.
void format_help(CLI::App& program);

/// All of a program's commands, in their order; and their names.
std::vector<const CLI::App*> commands_of(const CLI::App& program);
std::vector<std::string> command_names(const CLI::App& program);
/// nullptr if there is none of that name.
const CLI::App* command_named(const CLI::App& program, std::string_view name);

/// What to watch, and how to attach.
struct WatchOptions {
    LiveOptions live;
    Filter filter;
    IdleTimers idle_timers;
};
void add_watch_options(CLI::App& command, WatchOptions& options);
/// What no single flag can tell. Throws UsageError.
void check_combination(const WatchOptions& options);
/// What the source that works here does not tell. Throws UsageError.
void check_told(const Filter& filter, const SourceFacts& facts);

/// A flag whose text is turned into a value by `parse`, which may throw UsageError.
CLI::Option* add_parsed(CLI::App& command, const std::string& name, const std::string& type,
                        const std::string& description, std::function<void(const std::string&)> parse);

/// --for DURATION, of a second at least. `otherwise`: what holds without it, for its help.
CLI::Option* add_duration(CLI::App& command, std::optional<std::chrono::nanoseconds>& duration,
                          const std::string& otherwise);

/// All that a file holds, which is no more than `most_bytes`. Throws UsageError, which names the flag that named it.
std::string read_small_file(const std::string& path, std::size_t most_bytes, std::string_view flag);

/// Talk: to standard error.
void say(const std::string& message);

} // namespace finrace
