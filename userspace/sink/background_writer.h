// SPDX-License-Identifier: GPL-2.0-only OR MIT
// write() to a regular file, from a thread of its own. Of all that a daemon writes to, only regular files can't be
// asked whether they would take it now: a disk that is slow, a file system that is frozen and a server of files that is
// gone make whoever writes wait, whatever O_NONBLOCK says (open(2)). One write is under way at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

namespace finrace {

class BackgroundWriter {
public:
    /// What write(2) gave: how many bytes, or -1 and errno.
    struct Result {
        std::int64_t count;
        int error;
    };

    /// Starts the thread. Throws std::system_error if there can be none.
    BackgroundWriter();
    /// A write that does not come back is left to itself.
    ~BackgroundWriter();
    BackgroundWriter(const BackgroundWriter&) = delete;
    BackgroundWriter& operator=(const BackgroundWriter&) = delete;
    BackgroundWriter(BackgroundWriter&&) = delete;
    BackgroundWriter& operator=(BackgroundWriter&&) = delete;

    /// Begins to write a copy of `text`. Not while it is busy.
    void begin(int fd, std::string_view text);
    /// What the last write gave, once; nothing while it is under way.
    std::optional<Result> result();
    /// A write is under way, or its result has not been asked for.
    [[nodiscard]] bool busy() const { return busy_; }
    /// Readable once a write has ended, until its result is asked for.
    [[nodiscard]] int descriptor() const;

private:
    struct Shared;

    std::shared_ptr<Shared> shared_; ///< with the thread, which may outlive this
    bool busy_ = false;
};

} // namespace finrace
