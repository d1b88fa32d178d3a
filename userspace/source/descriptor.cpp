// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/descriptor.h"

#include <algorithm>
#include <array>
#include <cerrno>

#include <fcntl.h>

namespace finrace {

std::string read_whole(const std::string& path, std::size_t most)
{
    // A std::ifstream's buffer throws where read() fails, however its exceptions() are set.
    std::string text;
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    std::array<char, 4096> piece{};
    while (file && text.size() < most) {
        const ssize_t got = ::read(file.get(), piece.data(), std::min(piece.size(), most - text.size()));
        if (got > 0)
            text.append(piece.data(), static_cast<std::size_t>(got));
        else if (got == 0 || errno != EINTR)
            break;
    }
    return text;
}

} // namespace finrace
