// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The feed of what tcpdump captured: each file is a run of its own, judged by the capture's clock, and standard error
// is told what it does not have.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/stored_feed.h"
#include "source/capture.h"

namespace finrace {

class CaptureFeed final : public StoredFeed {
public:
    /// Throws InputError if one can't be read as a capture, and UsageError if the filter asks for what none shows.
    CaptureFeed(Filter filter, std::vector<Input> inputs);

    void run(Listener& listener) override;
    void know(IdleTimers timers) override { intake_->know(std::move(timers)); }

    [[nodiscard]] const Intake& intake() const override { return *intake_; }
    /// Events have the capture's clock, and that is the wall's.
    [[nodiscard]] const WallClock& clock() const override { return clock_; }
    [[nodiscard]] std::uint64_t now_ns() const override { return now_ns_; }
    [[nodiscard]] const SourceFacts& facts() const override { return facts_; }
    [[nodiscard]] SourceCounts counts() const override;
    [[nodiscard]] const ProcessNames& names() const override { return names_; }

    [[nodiscard]] bool failed() const override { return false; }
    /// Segments, and connections of one direction.
    [[nodiscard]] std::uint64_t missing() const override { return missing_; }
    [[nodiscard]] bool reads(int descriptor) const override;
    [[nodiscard]] const std::vector<CaptureFacts>& captures() const override { return captures_; }

private:
    void read(CaptureReader& file, Listener& listener);
    void note_end(const CaptureReader& file);

    std::vector<std::unique_ptr<CaptureReader>> files_;
    NotedProcessNames names_; ///< none
    std::optional<Intake> intake_;
    WallClock clock_{0};
    SourceFacts facts_;
    std::optional<Follower> follower_; ///< of the file that is read
    const CaptureReader* file_ = nullptr;
    std::uint64_t now_ns_ = 0;
    std::uint64_t missing_ = 0;
    std::vector<CaptureFacts> captures_;
    bool listening_ = true;
};

} // namespace finrace
