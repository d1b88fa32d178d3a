// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What `finrace run` is told, by its flags and its configuration file; and what of it a running one takes anew.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/command_line.h"
#include "cli/config_file.h"
#include "cli/options.h"
#include "cli/outputs.h"
#include "cli/recorder.h"
#include "cli/upstream_names.h"

namespace finrace {

struct RunOptions {
    WatchOptions watch;
    std::vector<OutputTarget> outputs{};
    std::chrono::nanoseconds interval = std::chrono::seconds(10);
    std::optional<std::chrono::nanoseconds> duration{};
    bool connections = false;
    bool flat = false;
    RecordOptions record{};
    std::optional<AddressPattern> metrics{};
    AddressOptions addresses{};
    std::vector<std::string> replayed{};
    bool unconfined = false;
    ConfigFile config{};
};

/// The flags. `options` must outlive the command.
void add_run_options(CLI::App& command, RunOptions& options);
/// What no single flag can tell. Throws UsageError.
void check_run_options(const RunOptions& options);

/// Which keys a running one takes anew, for people.
std::string reload_text();

/// Reads a configuration file again, below what the command line says.
class Reloader {
public:
    /// `command`: as its command line was read, with nothing of the file yet. Takes the file in. Throws UsageError.
    Reloader(CLI::App& command, const std::string& path);

    /// Whether there will be anything to read: of a pipe there is not.
    [[nodiscard]] bool can_read_again() const;
    /// From now on the file has a name from the root on, which it returns.
    std::string make_absolute();

    struct Reloaded {
        std::unique_ptr<RunOptions> options; ///< as they hold from now on
        std::vector<std::string> taken;      ///< keys that say something else than before, and can be changed
        std::vector<std::string> left;       ///< and those that take a restart
    };
    /// `facts`: of what runs. `records`: the raw events are recorded, whose filter stays. Throws UsageError, and then
    /// all stays as it was.
    Reloaded read(const SourceFacts& facts, bool records);
    /// Of what the file said at the start: see finrace::located().
    [[nodiscard]] std::string located(const std::string& text) const { return finrace::located(places_, text); }

private:
    std::string path_;
    KeyPlaces places_;
    Settings given_;  ///< on the command line
    Settings in_use_; ///< with the file's
};

} // namespace finrace
