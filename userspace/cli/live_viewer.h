// SPDX-License-Identifier: GPL-2.0-only OR MIT
// `finrace watch` on a terminal: races scroll by, the state of things stands below them, keys pause and filter.
#pragma once

#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "cli/intake.h"
#include "cli/keyboard.h"
#include "cli/live_loop.h"
#include "cli/live_terminal.h"
#include "core/traffic.h"
#include "sink/live_list.h"
#include "sink/live_view.h"
#include "sink/stream.h"
#include "sink/text.h"
#include "sink/timeline.h"
#include "source/host.h"

namespace finrace {

/// A verdict as the timeline shows it, before anything else of its connection has come.
Sighting sighting_of(const Judged& judged, const Feed& feed);

class LiveViewer final : public Listener {
public:
    /// All must outlive it. `filter`: of the command line.
    LiveViewer(Stream& stream, LiveLoop& loop, const Filter& filter);

    void on_event(const event& e) override;
    void on_verdict(const Judged& judged) override;
    bool on_tick() override;
    [[nodiscard]] std::vector<pollfd> awaited_outputs() const override { return {stream_.awaited()}; }
    void on_reader_left(int /*descriptor*/) override { stream_.reader_left(); }

    /// Shows what is left, and gives the terminal back. Returns what there is to say of what was not shown, in
    /// sentences.
    std::vector<std::string> finish();

private:
    struct Sample {
        std::vector<OpenSocket> sockets;
        std::uint64_t taken_ns;
        std::uint64_t took_ns;
    };

    void on_input();
    void press(const Key& key);
    void press_while_typing(const Key& key);
    void sample(std::uint64_t now_ns);
    void show(const std::vector<LiveList::Item>& items);
    void draw(std::uint64_t now_ns);
    [[nodiscard]] LiveStatus status(std::uint64_t now_ns);

    Stream& stream_;
    LiveLoop& loop_;
    const Filter& filter_;
    Paint paint_;
    bool tells_netns_;
    std::uint64_t began_ns_;
    SightingQueue queue_;
    LiveList list_;
    Traffic traffic_;
    bool sampled_ = false;
    std::future<Sample> sampling_;
    std::uint64_t next_sample_ns_ = 0;
    std::uint64_t next_count_ns_ = 0;
    std::uint64_t lost_ = 0;
    Keyboard keyboard_;
    std::uint64_t pressed_ns_ = 0;
    std::optional<std::string> typing_;
    bool ended_ = false;
    std::uint64_t next_draw_ns_ = 0;
    std::optional<LiveTerminal> terminal_;
};

} // namespace finrace
