// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The terminal while `finrace watch` has it: keys come one by one and unseen, the cursor is hidden, and lower lines are
// drawn over again in place. What it was before is restored on every way out, and while the job is stopped or in the
// background, where it neither reads nor draws.
//
// The cursor rests at the beginning of the lower lines. So whatever a terminal does with its lines when its size
// changes, all that is below the cursor is ours to erase.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include <termios.h>

#include "cli/terminal.h"
#include "sink/stream.h"
#include "source/descriptor.h"

namespace finrace {

class LiveTerminal {
public:
    /// Whether both standard input and output are terminals that can do this (TERM is set, and not dumb).
    static bool is_there();

    /// `stream` leads to standard output. Blocks the signals of job control, of resizing, and SIGQUIT.
    explicit LiveTerminal(Stream& stream);
    ~LiveTerminal();
    LiveTerminal(const LiveTerminal&) = delete;
    LiveTerminal& operator=(const LiveTerminal&) = delete;
    LiveTerminal(LiveTerminal&&) = delete;
    LiveTerminal& operator=(LiveTerminal&&) = delete;

    /// Readable when take_input() has something to do.
    [[nodiscard]] int descriptor() const { return epoll_.get(); }

    struct Input {
        std::string typed;
        bool ends = false; ///< SIGQUIT, or the terminal has gone
    };
    /// Never waits; but Ctrl-Z stops the process in here, until it is continued.
    Input take_input();

    /// The shell may have put the job into the foreground, or into the background, since.
    void look_who_is_in_front();
    /// Whether the lower lines may be drawn.
    [[nodiscard]] bool in_front() const { return in_front_; }

    /// Writes `text` (whole lines) above the lower lines, which have to be drawn again then.
    void write_above(std::string_view text);
    /// Draws the lower lines. Does nothing if they stand there already, or if the terminal has not taken all yet.
    void draw_below(const std::vector<std::string>& lines);
    /// What stands there may be anything.
    void forget_drawn() { drawn_.clear(); }

    /// As it is now; 80 by 24 if it doesn't tell.
    [[nodiscard]] static TerminalSize size();

private:
    void enter();
    void leave();
    void stop();

    Stream& stream_;
    Descriptor signals_;
    Descriptor epoll_;
    termios before_{};
    bool knows_before_ = false;
    bool in_front_ = false;
    bool below_ = false; ///< lines stand below the cursor
    std::string drawn_;
};

} // namespace finrace
