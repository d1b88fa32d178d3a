// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The feed of what was recorded: hands on what a run had taken in, in its order and at its times, and says on standard
// error what is missing.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/stored_feed.h"
#include "source/recording.h"

namespace finrace {

class Replay final : public StoredFeed {
public:
    /// Files of one run or several, in any order. Throws RecordingError, and UsageError if two are the same part.
    /// `connections`: records of whole connections are to be made of them. SIGINT and SIGTERM end it from now on.
    Replay(Filter filter, bool connections, const std::vector<std::string>& paths);
    /// The same of what is open already.
    Replay(Filter filter, bool connections, std::vector<std::unique_ptr<RecordingReader>> files);

    void run(Listener& listener) override;
    void know(IdleTimers timers) override { intake_->know(std::move(timers)); }

    [[nodiscard]] const Intake& intake() const override { return *intake_; }
    [[nodiscard]] const WallClock& clock() const override { return clock_; }
    [[nodiscard]] std::uint64_t now_ns() const override { return now_ns_; }
    [[nodiscard]] const SourceFacts& facts() const override { return header_.facts; }
    [[nodiscard]] SourceCounts counts() const override { return counts_; }
    [[nodiscard]] const ProcessNames& names() const override { return names_; }

    [[nodiscard]] bool failed() const override { return failed_; }
    /// Lines and parts.
    [[nodiscard]] std::uint64_t missing() const override { return missing_; }
    [[nodiscard]] bool reads(int descriptor) const override;

private:
    void read(RecordingReader& file, Listener& listener);
    void sort_files();
    void begin(const RecordingHeader& header, const RecordingReader& file, Listener& listener);
    void end_run(Listener& listener);

    std::vector<std::unique_ptr<RecordingReader>> files_;
    NotedProcessNames names_;
    std::optional<Intake> intake_;
    WallClock clock_{0};
    std::uint64_t now_ns_ = 0;
    RecordingHeader header_; ///< of the run that is read, and how far it has come
    SourceCounts counts_;
    std::vector<std::string> flags_; ///< the filter's, as they were typed
    bool needs_connections_;
    std::uint64_t gaps_ = 0; ///< in the file that is read
    std::uint64_t lines_in_gaps_ = 0;
    bool in_run_ = false;
    bool told_ = false; ///< something of the run
    bool failed_ = false;
    std::uint64_t missing_ = 0;
    bool listening_ = true;
};

} // namespace finrace
